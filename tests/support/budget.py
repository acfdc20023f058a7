"""A pytest plugin: processor seconds of each test file, held to ``budget.json`` beside it.

Wall-clock time depends on what else the machine does, processor time hardly does. What counts for a file is what its tests spend in their
worker, in processes that they start and wait for, and in ranks forked for them. The JSON also holds the seconds of a fixed piece of work,
the median over the run that wrote it: where that takes longer, each file gets as much more. Machines differ most in what their kernel takes
for forks and pages, so that part is told. Runs of what is deselected as a rule (`-m long`, `-m browser`), and of what needs a GPU
(`-m gpu`), are not held to a budget.
"""

from __future__ import annotations

import json
import mmap
import resource
import time
import zlib
from collections import Counter
from collections.abc import Generator, Mapping
from multiprocessing import forkserver
from statistics import median
from typing import Any

import psutil
import pytest

ALLOWED = 1.5
LEAST_S = 2.0
"""A file of less is noise of imports and fixtures, and may always take this much."""
CLOSE = 0.85
"""A file that takes this share of what it may is named, before a slower run of the same tests fails."""
_WORK = "fixed piece of work"


def spent() -> tuple[float, float]:
    """Processor seconds, in all and in the kernel, of this process, of children that have ended and of ranks that were forked."""
    user = system = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        user, system = user + usage.ru_utime, system + usage.ru_stime
    if (server := forkserver._forkserver._forkserver_pid) is not None:
        times = psutil.Process(server).cpu_times()
        user, system = user + times.user + times.children_user, system + times.system + times.children_system
    return user + system, system


def fixed_work() -> float:
    """Processor seconds, the least of three, of a loop, a compression and fresh memory.

    Products of matrices would wait in threads of their own.
    """
    found, data = [], bytes(range(256)) * 4096
    for _ in range(3):
        started = time.process_time()
        sum(n * n for n in range(400_000))
        zlib.compress(data, 6)
        with mmap.mmap(-1, 32 << 20) as fresh:
            for page in range(0, len(fresh), mmap.PAGESIZE):
                fresh[page] = 1
        found.append(time.process_time() - started)
    return min(found)


def limit(name: str, work_s: float, budget: Mapping[str, float]) -> float:
    """Processor seconds that a file may take here."""
    return max(LEAST_S, ALLOWED * budget[name]) * max(1.0, work_s / budget[_WORK])


def judged(spent_s: Mapping[str, float], system_s: Mapping[str, float], work_s: float, budget: Mapping[str, float]) -> list[str]:
    """What is wrong, a sentence a file."""
    wrong = []
    for name, seconds in sorted(spent_s.items()):
        if name not in budget:
            remedy = "write it with `pytest --write-budget`"
            wrong.append(f"{name} has no budget and took {seconds:.1f} processor seconds: {remedy}")
        elif seconds > (most := limit(name, work_s, budget)):
            allowed = f"over the {most:.1f} that its budget of {budget[name]:.1f} allows here"
            remedy = "make it cheaper, mark what is long as long, or say in the commit why the budget is raised"
            wrong.append(f"{name} took {seconds:.1f} processor seconds ({system_s[name]:.1f} in the kernel), {allowed}: {remedy}")
    return wrong


def close(spent_s: Mapping[str, float], work_s: float, budget: Mapping[str, float]) -> list[str]:
    """Files that are within their budget by little, each with what it took and may take."""
    known = {name: limit(name, work_s, budget) for name in sorted(spent_s) if name in budget}
    return [f"{name} {spent_s[name]:.1f} of {most:.1f}" for name, most in known.items() if CLOSE * most < spent_s[name] <= most]


class Plugin:
    """Adds up what each file spends; the controller of several workers judges the sum."""

    def __init__(self, config: pytest.Config) -> None:
        self.file = config.rootpath / "tests" / "budget.json"
        self.writes = config.getoption("--write-budget")
        self.judges = not config.getoption("markexpr").startswith(("long", "browser", "gpu"))  # campaigns have their time, and no budget
        self.spent: Counter[str] = Counter()
        self.system: Counter[str] = Counter()
        self.work: dict[str, float] = {}
        self.wrong: list[str] = []
        self.close: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        name = item.path.name
        if name not in self.work:
            self.work[name] = fixed_work()
        before = spent()
        try:
            return (yield)
        finally:
            total, system = spent()
            self.spent[name] += total - before[0]
            self.system[name] += system - before[1]

    def pytest_testnodedown(self, node: Any) -> None:
        found = getattr(node, "workeroutput", {}).get("budget", {"spent": {}, "system": {}, "work": {}})
        self.spent.update(found["spent"])
        self.system.update(found["system"])
        self.work |= found["work"]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["budget"] = {"spent": dict(self.spent), "system": dict(self.system), "work": self.work}
            return
        if not self.work:  # cut off before a worker could tell
            return
        work = median(self.work.values())
        known = json.loads(self.file.read_text()) if self.file.is_file() else {_WORK: work}
        if self.writes:
            slower = max(1.0, work / known[_WORK])
            known |= {name: round(seconds / slower, 1) for name, seconds in self.spent.items()}
            self.file.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
        elif self.judges and self.spent and self.file.is_file():
            self.wrong, self.close = judged(self.spent, self.system, work, known), close(self.spent, work, known)
            if self.wrong and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        total, system = sum(self.spent.values()), sum(self.system.values())
        work = f"; the fixed piece of work took {1000 * median(self.work.values()):.0f} ms" if self.work else ""
        terminalreporter.write_line(f"processor seconds: {total:.0f} ({system:.0f} in the kernel) in {len(self.spent)} files{work}")
        if self.close:
            terminalreporter.write_line(f"processor seconds close to what is allowed: {', '.join(self.close)}")
        for sentence in self.wrong:
            terminalreporter.write_line(f"over budget: {sentence}", red=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-budget", action="store_true", help="write what every file of this run takes to tests/budget.json")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Plugin(config), "processor-seconds")
