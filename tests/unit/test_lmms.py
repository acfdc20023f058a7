"""What lmms-eval is answered, against one plain forward for each text; the ``long`` test has lmms-eval itself ask."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import COLOURS, PROMPT, draw, plain_logp
from PIL import Image

from cfvlm_ds.batching.collator import load_collator
from cfvlm_ds.cli.lmms import checked_model
from cfvlm_ds.cli.main import main
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.distributed import World
from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.evaluation.lmms_requests import IMAGE, Answers

OPTIONS = [f"a {colour} circle and a {other} square" for colour, other in zip(COLOURS, COLOURS[::-1], strict=True)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("pictures")
    return [{"image": Image.open(draw(folder / f"{c}.png", [(c, "circle"), ("red", "square")])), "target": f"a {c}"} for c in COLOURS]


@pytest.fixture(scope="module")
def answers(scorer: Any, model_dir: Path) -> Answers:
    return Answers(scorer, load_collator(ModelConfig(str(model_dir)), "full"), World(0, 1, 0, torch.device("cpu")), batch_size=2)


def asked(*targets: Any, row: int = 0, context: str = PROMPT) -> list[Any]:
    """Requests as ConfigurableTask.construct_requests makes them."""
    return [SimpleNamespace(args=(context, target, lambda doc: [doc["image"]], row, "mine", "test")) for target in targets]


def plain(answers: Answers, image: Image.Image, text: str) -> tuple[float, int, bool]:
    """log p, tokens, and whether greedy decoding with the same prompt writes the text, by the library alone."""
    model, processor = answers.scorer.model, answers.collator.processor
    logp = plain_logp(model, processor, image, PROMPT, text)[0]
    inputs = processor(images=[image], text=[f"USER: <image>\n{PROMPT} ASSISTANT:"], return_tensors="pt")
    from cfvlm_ds.models.forest_attention import stock_attention

    with stock_attention(model):
        written = model.generate(**inputs, do_sample=False, max_new_tokens=len(logp), min_new_tokens=len(logp), pad_token_id=0)
    return logp.sum().item(), len(logp), processor.tokenizer.decode(written[0, inputs.input_ids.shape[1] :]).strip() == text


def documents(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {"mine": {"test": rows}}


def test_a_choice_has_the_loss_and_a_text_alone_its_log_likelihood(answers: Answers, rows: list[dict[str, Any]]) -> None:
    """With the delimiter that lmms-eval puts before an option; two rows, whose pictures differ, asked in turns."""
    requests = [each for k, text in enumerate(OPTIONS) for row in (0, 1) for each in asked(f" {text}", row=row)]
    found = answers.loglikelihood(requests, documents(rows))
    expected = [plain(answers, rows[row]["image"], text)[0] for text in OPTIONS for row in (0, 1)]
    assert [value for value, _ in found] == pytest.approx([-value for value in expected], rel=1e-4)
    assert min(value for value, _ in found) > 0, "lmms-eval takes the least"
    assert len({round(value, 3) for value, _ in found}) == 8, "the pictures matter"
    text, tokens, _ = plain(answers, rows[0]["image"], rows[0]["target"])
    alone = asked(lambda doc: doc["target"])
    assert answers.loglikelihood(alone, documents(rows))[0][0] == pytest.approx(text, rel=1e-4), "perplexity is exp(-mean)"
    means = Answers(answers.scorer, answers.collator, answers.world, per_token=True).loglikelihood(alone, documents(rows))
    assert means[0][0] == pytest.approx(text / tokens, rel=1e-4)


def test_greedy_is_what_generate_writes(answers: Answers, rows: list[dict[str, Any]]) -> None:
    given = {"max_new_tokens": 3, "min_new_tokens": 3, "until": [], "temperature": 0, "do_sample": False, "top_p": None}
    (written,) = answers.generate_until(asked(given, row=1), documents(rows))
    other = f"{written.rsplit(' ', 1)[0]} red" if not written.endswith("red") else f"{written.rsplit(' ', 1)[0]} blue"
    found = answers.loglikelihood(asked(written, other, OPTIONS[0], row=1), documents(rows))
    image = rows[1]["image"]
    assert [greedy for _, greedy in found] == [plain(answers, image, text)[2] for text in (written.strip(), other.strip(), OPTIONS[0])]
    assert [greedy for _, greedy in found] == [True, False, False]


def test_a_text_ends_where_the_task_says(answers: Answers, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    (whole,) = answers.generate_until(asked({"max_new_tokens": 6, "min_new_tokens": 6}), documents(rows))
    end = whole.split()[2]
    (cut,) = answers.generate_until(asked({"max_new_tokens": 6, "min_new_tokens": 6, "until": end, "frames": 8}), documents(rows))
    assert cut == whole.split(end)[0] and len(cut) < len(whole)
    assert "warning: the task's option frames (8) is not used" in capsys.readouterr().out
    torch.manual_seed(0)
    several = answers.generate_until(asked({"max_new_tokens": 6, "temperature": 9.0}, {"max_new_tokens": 6, "temperature": 9.0}), documents(rows))
    assert several[0] != several[1], "it draws where the task asks for it"


def test_pictures_stand_where_the_text_shows_them(answers: Answers, rows: list[dict[str, Any]]) -> None:
    first, marked = asked(OPTIONS[0]), asked(OPTIONS[0], context=f"{IMAGE}\n{PROMPT}")
    behind = asked(OPTIONS[0], context=f"{PROMPT} {IMAGE}")
    found = [answers.loglikelihood(each, documents(rows))[0][0] for each in (first, marked, behind)]
    assert found[0] == found[1] != found[2]
    both = SimpleNamespace(args=(PROMPT, OPTIONS[0], lambda doc: [doc["image"]] * 2, 0, "mine", "test"))
    none = SimpleNamespace(args=(PROMPT, OPTIONS[0], None, 0, "mine", "test"))
    values = [value for value, _ in answers.loglikelihood([both, none, *first], documents(rows))]
    assert values[2] == pytest.approx(found[0], rel=1e-5) and len(set(values)) == 3
    spaced = asked(OPTIONS[0], OPTIONS[0].replace(" and", "  and"))
    assert len({value for value, _ in answers.loglikelihood(spaced, documents(rows))}) == 2, "other white space is another text"


def test_what_cannot_be_answered_is_one_sentence(answers: Answers, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    video = SimpleNamespace(args=(PROMPT, "a cat", lambda doc: ["clip.mp4"], 3, "mine", "test"))
    for requests, said in (
        ([video], r"task 'mine', row 3 shows a str, and pictures alone"),
        (asked(" "), "task 'mine', row 0: the text whose likelihood is asked for is empty"),
        ([SimpleNamespace(args=("", "a cat"))], "acc_mutual_info takes the largest"),
        (asked("a </s> cat", row=0), "task 'mine', row 0"),
    ):
        with pytest.raises(DataError, match=said):
            answers.loglikelihood(requests, documents(rows) | {"mine": {"test": [*rows]}})
    with pytest.raises(DataError, match=r"task 'mine', row 0: .* lower max_new_tokens"):
        answers.generate_until(asked({"max_new_tokens": 10_000}), documents(rows))
    monkeypatch.setitem(sys.modules, "lmms_eval.api.instance", None)
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(ConfigError, match=r"lmms-eval is not installed.*pip install 'cfvlm-ds\[lmms\]'"):
        import cfvlm_ds.cli.lmms_model  # noqa: F401


def test_a_score_that_is_no_number_is_the_unlikeliest(answers: Answers, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's argmin would take it for the least."""
    monkeypatch.setattr("cfvlm_ds.evaluation.lmms_requests.likelihoods", lambda *_: [SimpleNamespace(logp=math.nan, tokens=2, greedy=True)])
    assert answers.loglikelihood(asked("a cat"), documents(rows)) == [(math.inf, False)]
    assert answers.loglikelihood(asked(lambda doc: "a cat"), documents(rows)) == [(-math.inf, False)]


def test_arguments_name_the_weights(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    main(["lmms_args", str(folder)])
    printed = dict(part.split("=") for part in capsys.readouterr().out.strip().split(","))
    assert printed["pretrained"] == str(folder) and printed["identity"].startswith("w")
    none = dict.fromkeys(("min_pixels", "max_pixels", "max_tiles"))
    assert checked_model(str(folder), printed["identity"], none)[0].name_or_path == str(folder)
    weights = folder / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(ConfigError, match=rf"identity={printed['identity']} is not that of .* as it is now.*: identity=w") as refused:
        checked_model(str(folder), printed["identity"], none)
    now = str(refused.value).rsplit("identity=", 1)[1]
    assert now != printed["identity"] and checked_model(str(folder), now, none)
    with pytest.raises(ConfigError, match=f"lack its identity, .*identity={now}"):
        checked_model(str(folder), "", none)
    with pytest.raises(SystemExit):
        main(["lmms_args", f"{folder},x"])
    assert "take no such letters" in capsys.readouterr().err
