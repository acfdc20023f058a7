"""CLIP and SigLIP as checks of candidates: models of random weights, against what each says of one text and picture alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import draw
from PIL import Image
from test_propose import quiet

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.counterfactuals.edit.step import edit
from cfvlm_ds.counterfactuals.judge import GOOD, Thresholds, read_thresholds, verdict
from cfvlm_ds.counterfactuals.options import EditOptions, ProposeOptions, VerifyOptions
from cfvlm_ds.counterfactuals.propose.step import propose
from cfvlm_ds.counterfactuals.second_opinion import SecondOpinion
from cfvlm_ds.counterfactuals.verify import verify
from cfvlm_ds.data import open_groups

TEXTS = ("a cup to the left of a plate", "a cup to the right of a plate")


def letters() -> dict[str, int]:
    marks = [chr(n) for n in range(33, 127)]
    return {word: n for n, word in enumerate([*marks, *(f"{c}</w>" for c in marks), "<|startoftext|>", "<|endoftext|>"])}


@pytest.fixture(scope="module", params=["clip", "siglip"])
def contrastive(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text, vision = size | {"vocab_size": 190, "max_position_embeddings": 40}, size | {"image_size": 32, "patch_size": 8}
    if request.param == "clip":
        text |= {"bos_token_id": 188, "eos_token_id": 189, "pad_token_id": 189}
        model: Any = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    else:
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(pictures, transformers.CLIPTokenizer(letters(), [], model_max_length=40)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    folder = tmp_path_factory.mktemp("pictures")
    draw(folder / "a.png", [("red", "circle"), ("blue", "square")])
    first = Image.open(folder / "a.png").convert("RGB")
    return [first, first.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]


def test_cosines_are_those_of_each_pair_alone(contrastive: Path, pictures: list[Image.Image]) -> None:
    found = SecondOpinion(str(contrastive)).cosines(TEXTS, pictures)
    model = transformers.AutoModel.from_pretrained(contrastive).eval()
    processor = transformers.AutoProcessor.from_pretrained(contrastive)
    for i, picture in enumerate(pictures):
        for t, text in enumerate(TEXTS):
            inputs = processor(text=[text], images=[picture], padding="max_length", max_length=40, return_tensors="pt")
            with torch.no_grad():
                logit = model(**inputs).logits_per_image[0, 0]
                bias = getattr(model, "logit_bias", torch.zeros(()))
                cosine = float((logit - bias) / model.logit_scale.exp())
            assert found[i][t] == pytest.approx(cosine, abs=2e-4)
    assert len({value for row in found for value in row}) > 1


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    transformers.CLIPImageProcessor().save_pretrained(tmp_path / "dino")
    for folder, said in ((tmp_path / "dino", "a dinov2 compares no pictures with texts"), (tmp_path, "--clip .* cannot be loaded")):
        with pytest.raises(ConfigError, match=said):
            SecondOpinion(str(folder))


def test_code_in_a_folder_is_not_run_whatever_the_terminal_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask whether to run it, and do so at a y."""
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    own = {"model_type": "own", "auto_map": {each: f"own.{each}" for each in ("AutoConfig", "AutoModel", "AutoProcessor")}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ConfigError, match=r"--clip .* cannot be loaded"):
        SecondOpinion(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("contrastive", ["clip"], indirect=True)
def test_verify_writes_all_of_it_down_and_thresholds_decide(contrastive: Path, pictures: list[Image.Image], tmp_path: Path) -> None:
    pictures[0].save(tmp_path / "a.png")
    rows = [{"id": "a", "image": "a.png", "caption": TEXTS[0]}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    propose(open_groups(tmp_path / "c.jsonl", None, "auto"), tmp_path / "W", ProposeOptions(types="relation,object"), 0, quiet)
    edit(tmp_path / "W", EditOptions(), 0, quiet)
    verify(tmp_path / "W", VerifyOptions(clip=str(contrastive)), 0, quiet, None)
    flipped, alone = (json.loads(line) for line in (tmp_path / "W" / "verify" / "shard-00000.jsonl").read_text().splitlines())
    assert flipped["models"] == {"clip": SecondOpinion(str(contrastive)).cosines(TEXTS, pictures)}
    assert len(alone["models"]["clip"]) == 1
    with pytest.raises(ConfigError, match=r"clip: .*then, '' now"):
        verify(tmp_path / "W", VerifyOptions(), 0, quiet, None)


def test_verdicts_by_cosines_by_hand(tmp_path: Path) -> None:
    checks = {"same_size": True, "identical": False, "changed": 0.1, "largest": 1.0}
    said = {"clip": [[0.31, 0.25], [0.22, 0.30]]}
    record = {"type": "colour", "checks": checks, "models": said}
    start = {"rule": "checks"}
    for given, more, reason in (
        ({}, {}, GOOD),
        ({"clip": 0.04}, {}, GOOD),
        ({"clip": 0.055}, {}, "clip: the edited picture for the new text"),
        ({"clip": 0.0}, {"clip": [[None, 0.1], [0.1, 0.2]]}, "clip: the caption on"),
    ):
        found = verdict(record | {"models": said | more}, Thresholds(**start, **given)).reason  # type: ignore[arg-type]
        assert found.startswith(reason) and (reason or not found), (given, found)
    (tmp_path / "t.yaml").write_text("rule: checks\nclip: 0.02\ndrop: null\n")
    assert read_thresholds(tmp_path / "t.yaml") == Thresholds(rule="checks", clip=0.02)
