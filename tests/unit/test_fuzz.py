"""A short run of the campaign of tests/support/fuzz.py, whose 10,000 rounds are part of ``make test-long``."""

from __future__ import annotations

import subprocess
import sys

from conftest import REPO, environment


def test_mutated_inputs_end_in_a_named_error_or_a_correct_run():
    """In a process of its own: the campaign has a process group, a process-wide limit on time and one processor for all rounds."""
    command = [sys.executable, "tests/support/fuzz.py", "60", "7"]
    done = subprocess.run(command, cwd=REPO, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and "60 rounds of seed 7, 0 defects" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
