"""Ranks as forks of one process that has imported everything: real processes with signals and exit codes, whose start costs no imports."""

from __future__ import annotations

import ctypes
import importlib
import json
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
    """With what it imports on its path, and the settings of CPU ranks in its environment from the beginning: OpenMP reads them once."""
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
    """Start ``MODULE:FUNCTION`` as so many ranks, in sessions of their own; what each says is added to ``said/rank-RANK.log``."""
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
    multiprocessing.set_start_method("fork", force=True)  # for data workers: what a process of its own has
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing is left of tests that are cut off
    os.setsid()
    os.chdir(REPO)
    take(variables | ON_CPU)
    output = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    module, name = function.split(":")
    getattr(importlib.import_module(module), name)(*arguments)


def take(variables: Mapping[str, str]) -> None:
    """Have these environment variables and no others: the server kept those of the test that started it, such as a tracking server's."""
    for name in os.environ.keys() - variables.keys() - {"PYTHONPATH"}:
        del os.environ[name]
    os.environ |= variables


def script(file: str, arguments: Sequence[str]) -> None:
    """``python FILE ARGUMENTS``."""
    sys.argv = [file, *arguments]
    sys.path.insert(0, str(Path(file).resolve().parent))
    runpy.run_path(file, run_name="__main__")


def train_script(arguments: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
    """``python train.py ARGUMENTS``, with these environment variables besides."""
    os.environ |= variables or {}
    script("train.py", arguments)


def train_all(listed: Path) -> None:
    """Trainings one after the other: each line of the file is one's options, a JSON list."""
    from cfvlm_ds.cli.train import run

    for line in listed.read_text().splitlines():
        run(json.loads(line))
