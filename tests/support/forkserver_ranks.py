"""Ranks forked from a process that has imported everything: real processes with signals and exit codes, but without the time of imports."""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest.mock import patch

from conftest import ON_CPU, REPO, environment, free_port

_PR_SET_PDEATHSIG = 1
_CONTEXT = multiprocessing.get_context("forkserver")


def _start_server() -> None:
    """Start the fork server with its imports on the path. Its environment has the settings of CPU ranks from the start, because OpenMP
    reads them only once.
    """
    _CONTEXT.set_forkserver_preload(["preloaded", "forkserver_ranks"])
    with patch.dict(
        os.environ,
        {
            **ON_CPU,
            "PYTHONPATH": os.pathsep.join([*(str(REPO / "tests" / part) for part in ("", "support", "unit", "distributed")), str(REPO)]),
        },
    ):
        forkserver.ensure_running()


def start(number: int, function: str, *arguments: object, said: Path) -> list[ForkServerProcess]:
    """Start ``MODULE:FUNCTION`` on ``number`` ranks, each in its own session. A rank's output is appended to ``said/rank-RANK.log``."""
    _start_server()
    shared = environment() | {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    said.mkdir(parents=True, exist_ok=True)
    ranks = []
    for rank in map(str, range(number)):
        variables = shared | {"RANK": rank, "LOCAL_RANK": rank}
        ranks.append(_CONTEXT.Process(target=_rank, args=(variables, function, arguments, said / f"rank-{rank}.log")))
        ranks[-1].start()
    return ranks


def _rank(variables: dict[str, str], function: str, arguments: Sequence[object], said: Path) -> None:
    assert "preloaded" in sys.modules, "ranks would each import everything"
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as in an ordinary process
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank survives an interrupted test
    os.setsid()
    os.chdir(REPO)
    take(variables | ON_CPU)
    output = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    module, name = function.split(":")
    getattr(importlib.import_module(module), name)(*arguments)


def take(variables: Mapping[str, str]) -> None:
    """Replace the environment with these variables. The fork server still has variables of the test that started it, such as a tracking
    server's address.
    """
    for name in os.environ.keys() - variables.keys() - {"PYTHONPATH"}:
        del os.environ[name]
    os.environ |= variables


def script(file: str, arguments: Sequence[str]) -> None:
    """Run ``python FILE ARGUMENTS`` in this process."""
    sys.argv = [file, *arguments]
    sys.path.insert(0, str(Path(file).resolve().parent))
    runpy.run_path(file, run_name="__main__")


def train_script(arguments: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
    """Run ``python train.py ARGUMENTS`` in this process, with additional environment variables."""
    os.environ |= variables or {}
    script("train.py", arguments)


def train_all(trainings: Sequence[list[str]]) -> None:
    """Execute training runs in order, each with its options."""
    from cfvlm_ds.cli.train import run

    for arguments in trainings:
        run(arguments)
