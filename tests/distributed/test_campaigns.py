"""The campaigns that take minutes: `make test-long` runs them. Each prints its table, which belongs into docs/reliability.md.

The shortest comes first: the worker that has it takes another one, and nothing waits for the one on Slurm, which is mostly waiting itself.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import REPO, environment, launcher, read_json, run

from cfvlm_ds.evaluation.before_after import from_table

pytestmark = pytest.mark.long


def campaign(*arguments: str, timeout: float) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=REPO, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_the_quickstart_runs_to_its_end_and_learns(tmp_path):
    """The README's command with fewer steps and sets: more pairs that contradict habit are told apart than by the base."""
    sets = {"contradicts": "runs/quickstart/world/test_contradicts.jsonl"}
    options = ["--config=examples/quickstart.yaml", "--train.max_steps=200", f"--data.evaluation={json.dumps(sets)}"]
    options += ["--train.output_dir", str(tmp_path / "run")]
    run([*launcher(1), "train.py", "--deepspeed", "ds_configs/z3.json", *options], timeout=4200)
    print((tmp_path / "run" / "results.md").read_text())
    rows = from_table(read_json(tmp_path / "run" / "before_after.json"))
    (change,) = (row for row in rows if row.edit == "mean of edit types" and row.metric == "group")
    assert change.difference > 2 and change.low > 0
    assert (tmp_path / "run" / "export" / "config.json").is_file()


def test_slurm_faults():
    """Nine faults to a job of eight nodes on a real Slurm: losses and weights are those of the undisturbed job."""
    assert "9 faults to one job, COMPLETED" in campaign("tests/slurm/faults.py", timeout=4500)


def test_kill_9_of_random_ranks():
    """Twelve times over one run of four ranks: weights, moments and losses have the bits of a run that nobody killed."""
    assert "12 rounds" in campaign("tests/support/kill_ranks.py", "4", "12", timeout=4200)
