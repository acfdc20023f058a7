"""What lmms-eval is answered, against one plain forward for each text; the ``long`` test has lmms-eval itself ask."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import COLOURS, PROMPT, REPO, draw, environment, plain_logp
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from cfvlm_ds.batching.collator import load_collator
from cfvlm_ds.core.config import ModelConfig
from cfvlm_ds.core.distributed import World
from cfvlm_ds.core.errors import ConfigError, DataError
from cfvlm_ds.evaluation.lmms_requests import IMAGE, Answers

OPTIONS = [f"a {colour} circle and a {other} square" for colour, other in zip(COLOURS, COLOURS[::-1], strict=True)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return [{"image": Image.open(draw(folder / f"{c}.png", [(c, "circle"), ("red", "square")])), "target": f"a {c}"} for c in COLOURS]


@pytest.fixture(scope="module")
def answers(scorer, model_dir):
    return Answers(scorer, load_collator(ModelConfig(str(model_dir)), "full"), World(0, 1, 0, torch.device("cpu")), batch_size=2)


def asked(*targets: Any, row: int = 0, context: str = PROMPT) -> list[Any]:
    """Requests as ConfigurableTask.construct_requests makes them."""
    return [SimpleNamespace(args=(context, target, lambda doc: [doc["image"]], row, "mine", "test")) for target in targets]


def plain(answers: Answers, image: Image.Image, text: str) -> tuple[float, int]:
    """log p and tokens by the library alone."""
    logp = plain_logp(answers.scorer.model, answers.collator.processor, image, PROMPT, text)[0]
    return logp.sum().item(), len(logp)


def documents(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {"mine": {"test": rows}}


def test_a_choice_has_the_loss_and_a_text_alone_its_log_likelihood(answers, rows):
    """With the delimiter that lmms-eval puts before an option; two rows, whose pictures differ, asked in turns."""
    requests = [each for k, text in enumerate(OPTIONS) for row in (0, 1) for each in asked(f" {text}", row=row)]
    found = answers.loglikelihood(requests, documents(rows))
    expected = [plain(answers, rows[row]["image"], text)[0] for text in OPTIONS for row in (0, 1)]
    assert [value for value, _ in found] == pytest.approx([-value for value in expected], rel=1e-4)
    assert min(value for value, _ in found) > 0, "lmms-eval takes the least"
    assert len({round(value, 3) for value, _ in found}) == 8, "the pictures matter"
    text, tokens = plain(answers, rows[0]["image"], rows[0]["target"])
    alone = asked(lambda doc: doc["target"])
    assert answers.loglikelihood(alone, documents(rows))[0][0] == pytest.approx(text, rel=1e-4), "perplexity is exp(-mean)"
    means = Answers(answers.scorer, answers.collator, answers.world, per_token=True).loglikelihood(alone, documents(rows))
    assert means[0][0] == pytest.approx(text / tokens, rel=1e-4)


def test_greedy_is_what_generate_writes(answers, rows):
    """Of a text that some prompt has the model write, which this one knows no words for."""
    given = {"max_new_tokens": 1, "min_new_tokens": 1, "until": [], "temperature": 0, "do_sample": False, "top_p": None}
    for prompt in (f"{text}{end}" for text in OPTIONS for end in ("", "?", ".", " or", " and", ":", "!", ";")):
        (word,) = (text.strip() for text in answers.generate_until(asked(given, context=prompt), documents(rows)))
        if word.isalpha() and len(answers.collator.prompts.encoded(prompt, word, 1, "").text_ids) == 1:
            break
    else:
        pytest.fail("no prompt has it write a word")
    others = [text for text in ("green", "blue", f"{word} {word} {word}", *OPTIONS) if text != word]
    found = answers.loglikelihood(asked(word, *others, context=prompt), documents(rows))
    least, *more = (each for each, _ in found)
    assert [greedy for _, greedy in found][:3] == [True, False, False] and least < min(more)
    assert not any(greedy for _, greedy in found[3:])


def test_a_text_ends_where_the_task_says(answers, rows, capsys):
    six = {"max_new_tokens": 6, "min_new_tokens": 6}
    (whole,) = answers.generate_until(asked(six), documents(rows))
    end = whole[len(whole) // 2 :][:2]
    (cut,) = answers.generate_until(asked({**six, "until": end, "frames": 8}), documents(rows))
    assert cut == whole.split(end)[0] and 0 < len(cut) < len(whole)
    assert "warning: the task's option frames (8) is not used" in capsys.readouterr().out
    torch.manual_seed(0)  # two draws may be equal
    several = answers.generate_until(
        asked(*[{**six, "temperature": 9.0}] * 2, {**six, "temperature": 9.0, "do_sample": False}), documents(rows)
    )
    assert several[0] != several[1] and several[2] == whole, "it draws where the task asks for it"


def test_pictures_stand_where_the_text_shows_them(answers, rows):
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


def test_what_cannot_be_answered_is_one_sentence(answers, rows, monkeypatch):
    video = SimpleNamespace(args=(PROMPT, "a cat", lambda doc: ["clip.mp4"], 3, "mine", "test"))
    for requests, said in (
        ([video], r"task 'mine', row 3 shows a str, but only pictures"),
        (asked(" "), "task 'mine', row 0: the text to score is empty"),
        ([SimpleNamespace(args=("", "a cat"))], "acc_mutual_info selects the largest"),
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


def test_a_score_that_is_no_number_is_the_unlikeliest(answers, rows, monkeypatch):
    """NumPy's argmin would take it for the least."""
    monkeypatch.setattr(Answers, "_likelihoods", lambda *_: [SimpleNamespace(logp=math.nan, tokens=2, greedy=True)])
    assert answers.loglikelihood(asked("a cat"), documents(rows)) == [(math.inf, False)]
    assert answers.loglikelihood(asked(lambda doc: "a cat"), documents(rows)) == [(-math.inf, False)]


# lmms-eval itself -------------------------------------------------------------------------------------------------------------------

REQUIREMENTS = ("datasets", "evaluate", "sacrebleu", "pytablewriter", "tenacity", "loguru", "pytz")
"""Of all that lmms-eval 0.7.3 requires, what its evaluator imports."""
ALONE = ("lmms-eval==0.7.3", "filelock<4")
"""It imports a module that filelock 4 has no more."""
TASKS = {
    "choice.yaml": """
task: mine_choice
output_type: multiple_choice
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: exact_match}]
""",
    "perplexity.yaml": """
task: mine_perplexity
output_type: loglikelihood
doc_to_target: "{{options[0]}}"
process_results: !function of_tasks.kept
metric_list: [{metric: perplexity}]
""",
    "text.yaml": """
task: mine_text
output_type: generate_until
doc_to_target: "{{options[0]}}"
generation_kwargs: {max_new_tokens: 5, temperature: 0, do_sample: false, until: ["\\0"]}
process_results: !function of_tasks.length
metric_list: [{metric: length, aggregation: mean, higher_is_better: true}]
""",
}
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
doc_to_text: "{{question}}"
doc_to_visual: !function of_tasks.pictures
"""
OF_TASKS = """
from PIL import Image


def pictures(doc):
    return [Image.open(doc["image"])]


def kept(doc, results):  # lmms-eval's own rule unpacks a pair where it has a list of one
    ((value, greedy),) = results
    return {"perplexity": value}


def length(doc, results):
    return {"length": len(results[0])}
"""


def environment_of_lmms_eval(folder: Path) -> Path:
    """The Python of an environment that has lmms-eval, and all else from this one; made where it is not there."""
    python, stamp = folder / "bin" / "python", folder / "requirements.txt"
    if not stamp.is_file() or stamp.read_text() != " ".join((*REQUIREMENTS, *ALONE)):
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
        here = Path(sysconfig.get_paths()["purelib"])
        (folder / here.relative_to(sys.prefix) / "beside.pth").write_text(f"{here}\n")
        install(python, *REQUIREMENTS)
        install(python, "--no-deps", "--ignore-installed", *ALONE)
        stamp.write_text(" ".join((*REQUIREMENTS, *ALONE)))
    return python


def install(python: Path, *what: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *what], check=True)


def wide_weights(source: Path, folder: Path, seed: int) -> Path:
    """The model with weights that make pictures and prompts matter."""
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15, generator=generator)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    model.save_pretrained(folder)
    return folder


@pytest.mark.long
def test_lmms_eval_asks_it(model_dir, tmp_path):
    """Three tasks of ours through its own evaluator, against the library's own forwards and generate; with its cache."""
    python = environment_of_lmms_eval(REPO / "runs" / "lmms-venv")
    copy = shutil.copytree(
        REPO, tmp_path / "source", ignore=lambda at, names: [name for name in names if name in NOT_BUILT or name[0] == "."]
    )
    install(python, "--no-deps", "--no-build-isolation", "--force-reinstall", str(copy))
    rows = [
        {"image": str(draw(tmp_path / f"{c}.png", [(c, "circle"), ("red", "square")])), "question": PROMPT, "options": OPTIONS, "answer": k}
        for k, c in enumerate(COLOURS)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder := tmp_path / "tasks").mkdir()
    (folder / "of_tasks.py").write_text(OF_TASKS)
    for name, text in TASKS.items():
        (folder / name).write_text(COMMON.replace("ROWS", str(tmp_path / "rows.jsonl")) + text)
    asking = [python, "-c", ASKING, folder, tmp_path / "cache"]
    alone = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    alone |= {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with (
        (tmp_path / "said").open("w") as said,
        subprocess.Popen(
            list(map(str, asking)), cwd=tmp_path, env=alone, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
        ) as process,
    ):
        assert process.stdin and process.stdout
        for seed in (0, 0, 1):
            model = wide_weights(model_dir, tmp_path / f"model{seed}", seed)
            process.stdin.write(f"pretrained={model}\n")
            process.stdin.flush()
            lines = list(itertools.takewhile(lambda line: not line.startswith("FOUND "), process.stdout))
            answer = next(process.stdout, "")
            assert answer, "".join(lines)[-4000:] + (tmp_path / "said").read_text()[-4000:]
            found = json.loads(answer)
            compare(model, rows, found["samples"], found["results"])
        process.stdin.close()


NOT_BUILT = ("runs", "tests", "docs", "site", "build", "dist", "mlruns")
ASKING = """
import json, sys
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

tasks, cache = sys.argv[1:]
manager = TaskManager(include_path=tasks, include_defaults=False, model_name="cfvlm_ds")
for line in sys.stdin:
    given = {"batch_size": 2, "device": "cpu", "use_cache": cache, "task_manager": manager}
    found = simple_evaluate("cfvlm_ds", line.strip(), tasks=["mine_choice", "mine_perplexity", "mine_text"], **given)
    print("FOUND ")
    print(json.dumps({name: found[name] for name in ("samples", "results")}, default=str), flush=True)
"""
"""Its own evaluator, for each line of arguments; its command does the same once, after it has read all of its own tasks."""


def compare(model: Path, rows: list[dict[str, Any]], samples: dict[str, Any], metrics: dict[str, Any]) -> None:
    """What lmms-eval has written, with the library alone."""
    plain, processor = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32), AutoProcessor.from_pretrained(model)
    with torch.no_grad():
        logp = [[plain_logp(plain, processor, (Path(row["image"]),), PROMPT, text)[0].sum().item() for text in OPTIONS] for row in rows]
    values = [[pair[0] for pair in each["filtered_resps"]] for each in samples["mine_choice"]]
    assert values == [pytest.approx([-value for value in line], rel=1e-4) for line in logp]
    chosen = [max(range(len(OPTIONS)), key=line.__getitem__) for line in logp]
    per_letter = [max(range(len(OPTIONS)), key=lambda c: line[c] / len(OPTIONS[c])) for line in logp]
    for name, best in (("acc", chosen), ("acc_norm", per_letter)):
        right = [k == each for k, each in enumerate(best)]
        assert metrics["mine_choice"][f"{name},none"] == pytest.approx(sum(right) / len(right)), name
    expected = math.exp(-sum(line[0] for line in logp) / len(logp))
    assert metrics["mine_perplexity"]["perplexity,none"] == pytest.approx(expected, rel=1e-3)
    for row, sample in zip(rows, samples["mine_text"], strict=True):
        inputs = processor(images=[Image.open(row["image"])], text=[f"USER: <image>\n{PROMPT} ASSISTANT:"], return_tensors="pt")
        whole = plain.generate(**inputs, do_sample=False, max_new_tokens=5)
        text = processor.tokenizer.decode(whole[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        assert sample["filtered_resps"] == [text.strip()] or sample["filtered_resps"] == [text]
