"""A pytest plugin: processor seconds of each test file, held to ``budget.json`` beside it.

Wall-clock time depends on what else the machine does, processor time hardly does. What counts for a file is what its tests spend in their
worker, in processes that they start and wait for, and in ranks forked for them. The JSON also holds the seconds of a fixed piece of work on
the machine that wrote it: a slower machine gets as much more. Runs of what is long (`-m long`) are not held to it.
"""

from __future__ import annotations

import json
import resource
import time
import zlib
from collections import Counter
from collections.abc import Generator
from multiprocessing import forkserver
from typing import Any

import psutil
import pytest

ALLOWED = 1.5
LEAST_S = 2.0
"""A file of less is noise of imports and fixtures, and may always take this much."""
_WORK = "fixed piece of work"


def spent() -> float:
    """Processor seconds of this process, of its children that have ended, and of the ranks that its fork server has seen end."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    if (server := forkserver._forkserver._forkserver_pid) is not None:
        total += sum(psutil.Process(server).cpu_times()[:4])
    return total


def fixed_work() -> float:
    """Processor seconds, the least of three, of a loop and of a compression. Products of matrices would wait in threads of their own."""
    found, data = [], bytes(range(256)) * 4096
    for _ in range(3):
        started = time.process_time()
        sum(n * n for n in range(400_000))
        zlib.compress(data, 6)
        found.append(time.process_time() - started)
    return min(found)


def judged(spent_s: dict[str, float], work_s: float, budget: dict[str, float]) -> list[str]:
    """What is wrong, a sentence a file."""
    slower = max(1.0, work_s / budget[_WORK])
    wrong = []
    for name, seconds in sorted(spent_s.items()):
        if name not in budget:
            remedy = "write it with `pytest --write-budget`"
            wrong.append(f"{name} has no budget and took {seconds:.1f} processor seconds: {remedy}")
        elif seconds > (limit := max(LEAST_S, ALLOWED * budget[name]) * slower):
            allowed = f"over the {limit:.1f} that its budget of {budget[name]:.1f} allows here"
            remedy = "make it cheaper, mark what is long as long, or say in the commit why the budget is raised"
            wrong.append(f"{name} took {seconds:.1f} processor seconds, {allowed}: {remedy}")
    return wrong


class Plugin:
    """Adds up what each file spends; the controller of several workers judges the sum."""

    def __init__(self, config: pytest.Config) -> None:
        self.file = config.rootpath / "tests" / "budget.json"
        self.writes = config.getoption("--write-budget")
        self.judges = config.getoption("markexpr") != "long"  # what is long has the time of its campaign, and no budget
        self.spent: Counter[str] = Counter()
        self.work = 0.0
        self.wrong: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.work = self.work or fixed_work()
        before = spent()
        try:
            return (yield)
        finally:
            self.spent[item.path.name] += spent() - before

    def pytest_testnodedown(self, node: Any) -> None:
        found = getattr(node, "workeroutput", {}).get("budget", {"spent": {}, "work": 0.0})
        self.spent.update(found["spent"])
        self.work = max(self.work, found["work"])

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["budget"] = {"spent": dict(self.spent), "work": self.work}
            return
        if not self.work:  # cut off before a worker could tell
            return
        known = json.loads(self.file.read_text()) if self.file.is_file() else {_WORK: self.work}
        if self.writes:
            slower = max(1.0, self.work / known[_WORK])
            known |= {name: round(seconds / slower, 1) for name, seconds in self.spent.items()}
            self.file.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
        elif self.judges and self.spent and self.file.is_file():
            self.wrong = judged(dict(self.spent), self.work, known)
            if self.wrong and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(f"processor seconds: {sum(self.spent.values()):.0f} in {len(self.spent)} files")
        for sentence in self.wrong:
            terminalreporter.write_line(f"over budget: {sentence}", red=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-budget", action="store_true", help="write what every file of this run takes to tests/budget.json")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Plugin(config), "processor-seconds")
