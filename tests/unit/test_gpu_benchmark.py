"""The one command for a card: every part of it runs on a CPU, and all its layouts compute one loss."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import REPO, environment

ABSENT = ("mlflow", "peft", "matplotlib", "PIL", "torchvision", "pyarrow", "sentencepiece")
"""What the package otherwise needs and a bare machine may lack."""


@pytest.mark.long
def test_the_command_runs_on_a_cpu(tmp_path):
    """From the source tree, without the launcher and most packages. No case fails, back ends for GPUs are named as such, and the losses of
    two ranks that share the device are those of one rank."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    command = [sys.executable, str(REPO / "benchmarks" / "gpu.py"), "--device", "cpu", "--small", "--json", str(tmp_path / "gpu.json")]
    started = {**environment(), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=started, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0 and "ERROR" not in done.stdout, done.stdout + done.stderr
    written = {(each["part"], each["case"]): each["result"] for each in json.loads((tmp_path / "gpu.json").read_text())["results"]}
    assert {part for part, _ in written} == {"card", "kernels", "scoring", "training", "ranks"}
    assert all(result["exact"] for result in written.values() if "exact" in result)
    assert "needs a CUDA device" in written["kernels", "16 + 2 texts, varlen"]["unusable"]
    layouts = written["scoring", "2 texts"]["layouts"]
    losses = [layouts[name]["loss"] for name in ("sparse", "shared prefix, sdpa")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    training = written["training", "ZeRO-3, gloo, 1 rank"]
    assert training["finite"] and len(training["losses"]) == 2 and training["losses"][-1] < training["losses"][0]
    (ranks,) = [result for (part, _), result in written.items() if part == "ranks"]
    assert ranks["backend"] == "gloo" and ranks["loss_off"] < 0.02
