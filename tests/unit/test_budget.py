"""The plugin that holds every test file to its processor seconds, on a folder of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from budget import close, fixed_work, judged
from conftest import REPO, environment

BURN = (
    "import time\n\ndef burn(seconds):\n    until = time.process_time() + seconds\n    while time.process_time() < until:\n        pass\n"
)
CHILD = "[sys.executable, '-c', 'import time\\nwhile time.process_time() < 2.5: pass']"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two workers; one file is within its budget, one spends too much, in a child, and one has no budget."""
    folder = tmp_path_factory.mktemp("budget")
    (tests := folder / "tests").mkdir()
    (tests / "test_within.py").write_text(f"{BURN}\ndef test_it():\n    burn(0.2)\n")
    (tests / "test_over.py").write_text(f"import subprocess, sys\n\ndef test_it():\n    subprocess.run({CHILD}, check=True)\n")
    (tests / "test_unknown.py").write_text("def test_it():\n    pass\n")
    (tests / "budget.json").write_text(json.dumps({"fixed piece of work": 2 * fixed_work(), "test_within.py": 0.2, "test_over.py": 0.1}))
    command = [sys.executable, "-m", "pytest", "-p", "budget", "-n", "2", "--dist", "loadfile", "--rootdir", str(folder), str(tests)]
    variables = environment() | {"PYTHONPATH": str(REPO / "tests" / "support")}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert "3 passed" in done.stdout and done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    return done.stdout


def test_a_file_over_its_budget_fails_a_run_whose_tests_pass(said: str) -> None:
    assert "over budget: test_over.py took 2." in said and "its budget of 0.1" in said
    assert "over budget: test_within.py" not in said


def test_a_file_without_a_budget_is_told_how_to_get_one(said: str) -> None:
    assert "over budget: test_unknown.py has no budget" in said and "pytest --write-budget" in said


def test_what_is_long_has_no_budget(tmp_path: Path) -> None:
    (tests := tmp_path / "tests").mkdir()
    (tests / "test_long.py").write_text("import pytest\n\n@pytest.mark.long\ndef test_it():\n    pass\n")
    (tests / "budget.json").write_text(json.dumps({"fixed piece of work": 1.0}))
    command = [sys.executable, "-m", "pytest", "-p", "budget", "-q", "--rootdir", str(tmp_path), str(tests)]
    variables = environment() | {"PYTHONPATH": str(REPO / "tests" / "support")}
    for options, code in (([], pytest.ExitCode.TESTS_FAILED), (["-m", "long"], pytest.ExitCode.OK)):
        done = subprocess.run([*command, *options], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120, check=False)
        assert "1 passed" in done.stdout and done.returncode == code, done.stdout + done.stderr


def test_a_slower_machine_gets_as_much_more() -> None:
    budget = {"fixed piece of work": 1.0, "test_a.py": 10.0}

    def wrong(seconds: float, work_s: float) -> list[str]:
        return judged({"test_a.py": seconds}, {"test_a.py": 1.0}, work_s, budget)

    assert wrong(15.1, 1.0) and not wrong(14.9, 1.0)
    assert wrong(30.1, 2.0) and not wrong(29.9, 2.0)
    assert wrong(15.1, 0.5), "a faster one does not get less"


def test_a_file_that_is_within_its_budget_by_little_is_named() -> None:
    budget = {"fixed piece of work": 1.0, "test_a.py": 10.0, "test_b.py": 10.0, "test_c.py": 10.0, "test_d.py": 0.1}
    taken = {"test_a.py": 12.0, "test_b.py": 14.0, "test_c.py": 15.1, "test_d.py": 1.9, "test_new.py": 9.0}
    assert close(taken, 1.0, budget) == ["test_b.py 14.0 of 15.0", "test_d.py 1.9 of 2.0"]
    assert close(taken, 1.1, budget) == ["test_c.py 15.1 of 16.5", "test_d.py 1.9 of 2.2"]
