"""What a researcher's own script can do and touch nothing of the package: an objective, as a page prints it, and a model family."""

from __future__ import annotations

import re

from conftest import REPO, losses, metrics, read_json, run_ranks, train_arguments, write_json
from safetensors.torch import load_file

FAMILY = """\
import sys
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from cfvlm_ds.cli.train import run
from cfvlm_ds.models import FAMILIES


class OwnConfig(LlavaConfig):
    model_type = "own_llava"


class OwnModel(LlavaForConditionalGeneration):
    config_class = OwnConfig


AutoConfig.register("own_llava", OwnConfig)
AutoModelForImageTextToText.register(OwnConfig, OwnModel)
register_checkpoint_conversion_mapping("own_llava", get_checkpoint_conversion_mapping("llava"))
FAMILIES["own_llava"] = FAMILIES["llava"]
run(sys.argv[1:])
"""


def test_the_objective_of_the_page_trains(model_dir, manifests, tmp_path):
    """At most 40 lines, of which two methods are needed; beside the package's own terms, with its options on the command line."""
    section = (REPO / "docs" / "extending.md").read_text().split("\n## An objective\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(block.splitlines()) <= 40 and block.count("    def ") == 2
    script, called = tmp_path / "mine.py", re.compile(r"^run\(\[.*\]\)$", re.MULTILINE)
    assert called.search(block)
    script.write_text(called.sub("import sys\nrun(sys.argv[1:])", block))
    options = train_arguments(model_dir, manifests, tmp_path / "run", "--train.max_steps=3", "--objective.softmax.weight=0.5")
    ((code, said),) = run_ranks(1, "forkserver_ranks:script", str(script), options)
    assert code == 0, said
    assert all({"loss/softmax", "loss/align"} <= row.keys() for row in metrics(tmp_path / "run") if "loss" in row)
    assert len(losses(tmp_path / "run")) == 3


def test_a_family_of_ones_own_trains_as_the_one_it_is_like(model_dir, manifests, tmp_path):
    """A model type that the package does not know is refused; one line of a script makes it a LLaVA, bit for bit in losses and export."""
    for file in model_dir.iterdir():
        (tmp_path / "model" / file.name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    described = read_json(tmp_path / "model" / "config.json")
    renamed = described | {"model_type": "own_llava", "architectures": ["OwnModel"]}
    write_json(tmp_path / "model" / "config.json", renamed)
    (tmp_path / "own.py").write_text(FAMILY)
    (tmp_path / "unknown.py").write_text(FAMILY.replace('FAMILIES["own_llava"] =', "_ ="))
    short = ("--train.max_steps=3", "--train.export=true")
    for script, code, model in (("unknown", 1, tmp_path / "model"), ("own", 0, tmp_path / "model"), ("own", 0, model_dir)):
        run_dir = tmp_path / f"{script}-{model.name}"
        options = train_arguments(model, manifests, run_dir, *short)
        ((ended, said),) = run_ranks(1, "forkserver_ranks:script", str(tmp_path / f"{script}.py"), options)
        assert ended == code, said
        if code:
            assert "model type 'own_llava' is not supported" in said and not run_dir.exists()
    own, llava = tmp_path / "own-model", tmp_path / f"own-{model_dir.name}"
    assert losses(own) == losses(llava) and len(losses(own)) == 3
    assert read_json(own / "export" / "config.json")["model_type"] == "own_llava"
    ours, theirs = (load_file(run_dir / "export" / "model.safetensors") for run_dir in (own, llava))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in theirs)
