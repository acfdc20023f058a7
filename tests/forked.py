"""Ranks as forks of one process: every start-up after the first costs no imports. They are real processes, with one process group."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import deepspeed  # noqa: F401

import cfvlm_ds.cli
import cfvlm_ds.training  # noqa: F401


def start(number: int, function: Callable[[], object], said: Path) -> list[ForkProcess]:
    """Start ``function`` as so many ranks, whose output goes to ``said/RANK.out``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    said.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    ranks = []
    for rank in range(number):
        variables = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(context.Process(target=_rank, args=(variables, function, said / f"{rank}.out")))
        ranks[-1].start()
    return ranks


def _rank(variables: dict[str, str], function: Callable[[], object], said: Path) -> None:
    os.environ.update(variables)
    output = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    function()
