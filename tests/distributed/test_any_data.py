"""One run on files of every public format at once: all train, each is evaluated, and a run that is killed goes on bit for bit."""

from __future__ import annotations

import json
import math
import os
import signal
from typing import Any

import forkserver_ranks
import pytest
from conftest import losses, metrics, read_json, run_trainings, train_arguments, wait_for
from public_data import PUBLIC

pytestmark = pytest.mark.long
ROWS = 204


def test_a_mixture_of_all_formats(model_dir, manifests, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sources: dict[str, dict[str, Any]] = {}
    for name, (write, _) in PUBLIC.items():
        (folder := tmp_path / "data" / name).mkdir(parents=True)
        path, format = write(folder, ROWS)
        sources[name.replace(" ", "-")] = {"path": str(path), "format": format}
    listed = json.dumps([{**source, "name": name, "weight": 1 + k % 3} for k, (name, source) in enumerate(sources.items())])

    def arguments(name: str, *extra: str) -> list[str]:
        steps = ["--train.max_steps=6", "--train.save_steps=1", "--train.save_total_limit=0", "--data.train", listed]
        packed = ["--data.max_tokens_per_micro_batch=1500"]
        return train_arguments(model_dir, manifests, tmp_path / name, *steps, *packed, *extra)

    said = run_trainings(2, arguments("whole", "--data.evaluation", json.dumps(sources)), timeout=1500)
    results = read_json(tmp_path / "whole" / "results.json")
    assert results.keys() == sources.keys()
    for name, rows in results.items():
        assert rows[-1]["num"] == ROWS and math.isfinite(rows[-1]["losses"]["align"]["value"]), name
    seen = {metric for row in metrics(tmp_path / "whole") for metric in row}
    assert {f"loss/align/{name}" for name in sources} | {f"epoch/{name}" for name in sources} <= seen
    for name, (_, says) in PUBLIC.items():
        false = any(truth == 0 for k in range(ROWS) for line in says(k).match for truth in line)
        own = {metric for metric in seen if metric.startswith("loss/") and metric.endswith(f"/{name.replace(' ', '-')}")}
        assert (len(own) > 1) == false, f"{name} has something false, or nothing but a likelihood: {own}"
    for name, source in sources.items():  # each is trained on and evaluated
        begin = f"warning: data.evaluation.{name}: {ROWS} of its {ROWS} rows and "
        assert any(line.startswith(begin) and f" {source['path']}" in line for line in said.splitlines()), name

    ranks = forkserver_ranks.start(2, "forkserver_ranks:train_all", [arguments("broken")], said=tmp_path / "killed-said")
    wait_for((tmp_path / "broken" / "checkpoint-3" / "complete.json").exists, 600)
    for rank in ranks:
        os.killpg(rank.pid or 0, signal.SIGKILL)
    for rank in ranks:
        rank.join()
    assert all(rank.exitcode == -signal.SIGKILL for rank in ranks)
    again = run_trainings(2, arguments("broken"), timeout=900)
    assert "resumed from" in again and losses(tmp_path / "broken") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 6
