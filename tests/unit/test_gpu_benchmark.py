"""The one command for a card: every part of it runs on a CPU, and what takes its process with it is named while the rest goes on."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO, environment

ABSENT = ("mlflow", "peft", "matplotlib", "PIL", "torchvision", "pyarrow", "sentencepiece")
"""What the package otherwise needs and a bare machine may lack."""


@pytest.fixture(scope="module")
def gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "benchmarks"))
        return importlib.import_module("gpu")


def measured(tmp_path: Path, *parts: str) -> tuple[dict[tuple[str, str], dict[str, Any]], str]:
    """What the command writes and prints, from the source tree, without the launcher and most packages."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    command = [sys.executable, str(REPO / "benchmarks" / "gpu.py"), "--device", "cpu", "--small", "--json", str(tmp_path / "gpu.json")]
    started = {**environment(), "PYTHONPATH": str(tmp_path)}
    command += ["--parts", *parts] if parts else []
    done = subprocess.run(command, cwd=tmp_path, env=started, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0 and "ERROR" not in done.stdout, done.stdout + done.stderr
    written = {(each["part"], each["case"]): each["result"] for each in json.loads((tmp_path / "gpu.json").read_text())["results"]}
    return written, done.stdout


def test_every_part_of_one_process_runs_on_a_cpu(tmp_path):
    """No case fails, back ends for GPUs are named as such."""
    written, printed = measured(tmp_path, "card", "kernels", "scoring", "training")
    assert {part for part, _ in written} == {"card", "kernels", "scoring", "training"}
    assert all(result["exact"] for result in written.values() if "exact" in result)
    assert "needs a CUDA device" in written["kernels", "16 + 2 texts, varlen"]["unusable"]
    layouts = written["scoring", "2 texts"]["layouts"]
    losses = [layouts[name]["loss"] for name in ("sparse", "shared prefix, sdpa", "shared prefix, flex")]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    training = written["training", "ZeRO-3, gloo, 1 rank"]
    assert training["finite"] and len(training["losses"]) == 2 and training["losses"][-1] < training["losses"][0]
    assert "2 texts: the fastest exact back end is" in printed


@pytest.mark.long
def test_the_whole_command_runs_on_a_cpu(tmp_path):
    """Two ranks that share the device too; their losses are those of one rank."""
    written, _ = measured(tmp_path)
    assert {part for part, _ in written} == {"card", "kernels", "scoring", "training", "ranks"}
    (ranks,) = [result for (part, _), result in written.items() if part == "ranks"]
    assert ranks["backend"] == "gloo" and ranks["loss_off"] < 0.02


STAND_IN = """
import json, os, sys, time
into, left, without = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
def note(**line):
    with open(into, "a") as file:
        file.write(json.dumps(line) + "\\n")
cases = [["card", "well"], ["kernels", "dies"], ["kernels", "after it"], ["scoring", "layouts"], ["training", "hangs"], ["ranks", "last"]]
cases = [case for case in cases if left is None or case in left]
note(cases=cases)
for part, name in cases:
    note(begun=[part, name])
    if name == "layouts":
        note(at="good")
        note(at="bad")
        if "bad" not in without:
            os._exit(4)
        note(at=None)
    if name == "dies":
        print("a sentence of its own", file=sys.stderr, flush=True)
        os._exit(3)
    if name == "hangs":
        time.sleep(60)
    note(ended=[part, name], result={"unusable": "measured"})
"""


def test_what_ends_its_process_is_named_and_the_rest_goes_on(gpu, tmp_path, monkeypatch):
    """A case that dies, a layout that does, a part that hangs: each costs itself and nothing else, and all is written."""

    class Acted(gpu.Parts):
        def command(self, into: Path) -> list[str]:
            return [sys.executable, "-S", "-c", STAND_IN, str(into), json.dumps(self.left), *self.without]

    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    parts = Acted(argparse.Namespace(device="cpu", small=True, parts=list(gpu.SHARES), minutes=8.0, json=tmp_path / "gpu.json"))
    parts.ends["training"] = time.monotonic() + 3
    results = parts.run()
    assert results["kernels", "dies"] == {"error": "the process ended with exit code 3: a sentence of its own"}
    assert results["training", "hangs"] == {"error": "unfinished when the part's time was up"}
    fine = [key for key, result in results.items() if "unusable" in result]
    assert fine == [("card", "well"), ("kernels", "after it"), ("scoring", "layouts"), ("ranks", "last")]
    assert parts.without == ["bad"] and len(json.loads((tmp_path / "gpu.json").read_text())["results"]) == 6


def test_a_process_that_never_begins_is_one_error(gpu, tmp_path, monkeypatch):
    class Broken(gpu.Parts):
        def command(self, into: Path) -> list[str]:
            return [sys.executable, "-S", "-c", "raise SystemExit('torch sees no CUDA device')"]

    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    parts = Broken(argparse.Namespace(device="cuda", small=False, parts=["kernels"], minutes=8.0, json=tmp_path / "gpu.json"))
    assert parts.run() == {("kernels", "start"): {"error": "the process ended with exit code 1: torch sees no CUDA device"}}
