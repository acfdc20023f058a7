"""Real trainings that report to a real MLflow server: what is there at the end, after a kill, and after a crash."""

from __future__ import annotations

import json
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from conftest import REPO, flat, losses, read_json, run_train, run_trainings, train_arguments
from safetensors.torch import load_file
from test_engine import expected_module as module_of

from cfvlm_ds.core.run_folder import FILES, FOLDERS
from cfvlm_ds.data import read_manifest
from cfvlm_ds.data.identity import data_identity, digest
from cfvlm_ds.data.picture_index import PictureTable
from cfvlm_ds.tracking.mlflow_delivery import mlflow_names

ARTIFACTS = {"config.yaml", "ds_config.json", "environment.json", "data.json", "results.md", "results.json", "before_after.json"}
ARTIFACTS |= {"learning_curves.png"}


@pytest.fixture(scope="module")
def client(server):
    """The server that every training of this module finds in its environment."""
    server.up()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", server.url)
        patch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
        yield mlflow.MlflowClient(tracking_uri=server.url)


def tracked(model_dir: Path, manifests: dict[str, Path], output_dir: Path, *extra: str) -> list[str]:
    """Options of a tracked training; its experiment has the name of its folder."""
    options = ["--tracking.enabled=true", "--tracking.experiment", output_dir.name, "--train.figures=true"]
    return train_arguments(model_dir, manifests, output_dir, *options, *extra)


def the_run(client: Any, experiment: str) -> Any:
    """The one run of an experiment."""
    (found,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return found


def on_server(client: Any, run: Any) -> dict[str, list[tuple[int, float]]]:
    """Every metric's (step, value) in order."""
    return {name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}


def on_disk(output_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """The same of metrics.jsonl."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in (output_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, shown in mlflow_names(row.keys() - {"step", "time"}).items():
            points.setdefault(shown, []).append((row["step"], float(row[name])))
    return points


# A run that ends well -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(client, model_dir, manifests, tmp_path_factory):
    """Two ranks, four steps, an evaluation in between and at the end."""
    folder = tmp_path_factory.mktemp("data") / "finished"
    extra = ["--train.max_steps=4", "--train.eval_steps=2", "--train.per_device_train_batch_size=8"]
    extra += [f"--data.evaluation.test={manifests['test']}", "--tracking.run_name", "four steps", "--model.projector.learning_rate=1e-4"]
    run_train(2, tracked(model_dir, manifests, folder, *extra))
    return folder


def test_metrics_are_on_the_server_as_on_disk(client, finished):
    found = on_server(client, the_run(client, "finished"))
    assert found == on_disk(finished)
    found = {name.partition("/")[2]: points for name, points in found.items()}
    every_step = set(["loss", "learning_rate", "grad_norm", "epoch", "skipped_steps", "skipped_groups"])
    every_step |= {
        f"{kind}/{name}"
        for kind, names in {
            "loss": "align csd fcd", "logp": "lp_00 lp_kk lp_k0 lp_0k", "active": "csd fcd", "violated": "csd fcd",
            "learning_rate": "vision_tower projector language_model",
            "throughput": "candidates_per_s tokens_per_s images_per_s model_tflop_per_s data_wait_share all_gather_share",
        }.items()
        for name in names.split()
    }  # fmt: skip
    every_step.add("throughput_groups_per_s")
    assert {name for name in found if not name.startswith(("eval", "checkpoint/"))} == every_step
    for name in ("seconds", "share", "failed"):
        assert [step for step, _ in found[f"checkpoint/{name}"]] == [4], name
    assert 0 < found["checkpoint/share"][0][1] < 1 and 0 < found["checkpoint/seconds"][0][1] < 60, "of the time since the start"
    for name in every_step:
        assert [step for step, _ in found[name]] == [1, 2, 3, 4], name
    for name in (
        "eval_test_group",
        "eval_test_pair",
        *map("eval/test/{}".format, ("text", "image", "group_pmi", "sham", "blind_pair", "loss")),
    ):
        assert [step for step, _ in found[name]] == [2, 4], name
    for name, separator in (("loss", "/"), ("eval/test/loss", "_")):
        terms = (found[f"{name}{separator}{term}"] for term in ("align", "csd", "fcd"))
        for (_, whole), (_, align), (_, csd), (_, fcd) in zip(found[name], *terms, strict=True):
            assert whole == pytest.approx(align + 0.5 * csd + 0.7 * fcd, rel=1e-5), "with the full weights, from step 1"


def test_parameters_and_tags_describe_the_run(client, finished, model_dir):
    import yaml

    found = the_run(client, "finished")
    assert (found.info.status, found.info.run_name) == ("FINISHED", "four steps")
    params = found.data.params
    configured = flat(yaml.safe_load((finished / "config.yaml").read_text()))
    assert configured["train.max_steps"] == 4 and configured.pop("train.num_train_epochs"), "which has no effect"
    configured = {name: value for name, value in configured.items() if not name.startswith("model.lora.")}  # neither have these
    assert params.keys() == {name for name, value in configured.items() if value is not None} and 60 < len(params) < len(configured)
    assert (params["model.name_or_path"], params["objective.fcd.weight"]) == (str(model_dir), "0.7")
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()
    tags = found.data.tags
    assert (tags["model_type"], tags["git_revision"], tags["world_size"]) == ("llava", revision, "2")
    assert (tags["mlflow.source.type"], tags["mlflow.source.git.commit"]) == ("LOCAL", revision)
    assert Path(tags["mlflow.source.name"]) == REPO / "train.py"


def test_the_runs_data_sets_are_there_by_digest_size_and_place(client, finished, manifests):
    inputs = {each.dataset.name: each for each in the_run(client, "finished").inputs.dataset_inputs}
    listed = {each["name"]: each for each in read_json(finished / "data.json")}
    assert inputs.keys() == listed.keys() == {"train", "test"}
    for name, context in (("train", "training"), ("test", "evaluation")):
        groups = read_manifest(manifests[name])
        pictures = PictureTable.of_files(picture for group in groups for image in group.images for picture in image)
        assert inputs[name].dataset.digest == digest(data_identity(groups, [manifests[name].parent], pictures)) == listed[name]["digest"]
        assert json.loads(inputs[name].dataset.source) == {"uri": str(manifests[name])}
        assert json.loads(inputs[name].dataset.profile)["num_rows"] == len(groups)
        assert {tag.key: tag.value for tag in inputs[name].tags} == {"mlflow.data.context": context}


def test_what_a_run_writes_is_known_by_name(finished):
    """A link or pipe of such a name is refused at a start (cfvlm_ds.core.run_folder)."""
    listed = [path.name for path in finished.iterdir() if not path.name.startswith("checkpoint-")]
    assert len(listed) > 12 and not [name for name in listed if not any(fnmatch(name, known) for known in (*FILES, *FOLDERS))]


def test_the_page_of_results_leads_to_the_worst_groups(finished, manifests):
    """Smallest margin first; test_view has the margins by hand."""
    page = (finished / "results.html").read_text()
    assert (
        f" after 4 steps ({len(read_manifest(manifests['train']))} groups, {on_disk(finished)['detail/epoch'][-1][1]:.1f} epochs) on "
        in page
    )
    assert '<a href="worst/index.html">' in page and page.count("<table>") >= 2 and '<img src="learning_curves.png"' in page
    page = (finished / "worst" / "index.html").read_text()
    assert (
        "<h1>finished after 4 steps: groups with the smallest margins of test</h1>" in page and f"{manifests['test'].parent}/" not in page
    )
    shown = [float(worst) for worst in re.findall(r'data-worst="([^"]*)"', page)]
    assert shown == sorted(shown) and len(shown) > 3


def test_artifacts_are_the_files_of_the_run_folder(client, finished, tmp_path):
    run_id = the_run(client, "finished").info.run_id
    assert {item.path for item in client.list_artifacts(run_id)} == ARTIFACTS
    for name in sorted(ARTIFACTS):
        assert Path(client.download_artifacts(run_id, name, str(tmp_path))).read_bytes() == (finished / name).read_bytes(), name
    assert "| test | mean of edit types |" in (tmp_path / "results.md").read_text()
    described = read_json(tmp_path / "environment.json")
    assert described["world_size"] == 2 and described["packages"]["deepspeed"]
    assert read_json(tmp_path / "ds_config.json")["zero_optimization"]["stage"] == 3


# A run that does not ---------------------------------------------------------------------------------------------------------------------


# Modules, through real runs -------------------------------------------------------------------------------------------------------------


def test_freezing_learning_rates_and_gradient_checkpointing(model_dir, manifests, tmp_path):
    """Three trainings under ZeRO-3 in one process, judged by their exports: plain torch sees what every module's weights did."""
    rates = {"vision_tower": 1e-3, "projector": 2e-3, "language_model": 4e-3}
    own = [part for module, rate in rates.items() for part in (f"--model.{module}.learning_rate", str(rate))]
    frozen = ["--train.max_steps=2", "--model.vision_tower.tuning=frozen"]
    runs = {
        # AdamW's first step moves every weight by the learning rate, whatever its gradient.
        "rates": ["--train.max_steps=1", "--train.lr_scheduler_type=constant", "--train.warmup_ratio=0", *own],
        "frozen": frozen,
        "recomputed": [*frozen, "--model.gradient_checkpointing=true"],
    }
    always = ["--train.export=true", "--train.per_device_train_batch_size=8"]
    arguments = [train_arguments(model_dir, manifests, tmp_path / name, *always, *extra) for name, extra in runs.items()]
    output = run_trainings(1, *arguments, by="rank_functions:counted")

    source = load_file(model_dir / "model.safetensors")
    exported = {name: load_file(tmp_path / name / "export" / "model.safetensors") for name in runs}
    moves: dict[str, list[float]] = {module: [] for module in rates}
    for name, tensor in source.items():
        moves[module_of(name)].append(float((exported["rates"][name] - tensor).abs().max()))
        if module_of(name) == "vision_tower":
            assert torch.equal(exported["frozen"][name], tensor), name
        else:
            assert not torch.equal(exported["frozen"][name], tensor), name
    assert {module: max(values) for module, values in moves.items()} == pytest.approx(rates, rel=0.02)
    assert "tower [1, 2, 2] language [1, 2, 4]" in output, "recomputed in the backward pass, once per step, but not where nothing trains"
    assert losses(tmp_path / "recomputed") == pytest.approx(losses(tmp_path / "frozen"), rel=1e-5)
