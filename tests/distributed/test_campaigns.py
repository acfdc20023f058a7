"""The campaigns that take minutes: `make test-long` runs them. Each prints its table, which belongs into docs/reliability.md.

The shortest comes first: the worker that has it takes another one, and nothing waits for the one on Slurm, which is mostly waiting itself.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import REPO, environment, launcher, run

pytestmark = pytest.mark.long


def campaign(*arguments: str, timeout: float) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=REPO, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_the_quickstart_runs_to_its_end_and_learns(tmp_path):
    """The README's command: on combinations never trained on, group accuracy over all edits is twice what chance gives (16.7 %)."""
    run([*launcher(1), "train.py", "--deepspeed", "ds_configs/z3.json", "--train.output_dir", str(tmp_path / "run")], timeout=4200)
    print((tmp_path / "run" / "results.md").read_text())
    (accuracy,) = (row for row in json.loads((tmp_path / "run" / "results.json").read_text())["combo"] if row["name"] == "all")
    assert accuracy["metrics"]["group"] > 33.4
    assert (tmp_path / "run" / "export" / "config.json").is_file()


def test_slurm_faults():
    """Nine faults to a job of eight nodes on a real Slurm: losses and weights are those of the undisturbed job."""
    assert "9 faults to one job, COMPLETED" in campaign("tests/slurm/faults.py", timeout=4500)


def test_kill_9_of_random_ranks():
    """Thirty times over one run of four ranks: weights, moments and losses have the bits of a run that nobody killed."""
    assert "30 rounds" in campaign("tests/support/kill_ranks.py", timeout=4200)
