"""train.py with a phase that never ends, or with evaluation forwards that take half a second longer. The file ``mark`` appears when the
wait begins.

The phase waits in the C library, like a collective or a decoder, so Python's signal handlers cannot run.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine
from forkserver_ranks import train_script

from cfvlm_ds.training import run, trainer


def held(mark: Path, function: Callable[..., Any]) -> Callable[..., Any]:
    def wait(*arguments: Any, **named: Any) -> None:
        mark.touch()
        lock, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)  # a mutex of the C library; zeros initialise it
        for _ in range(2):
            library.pthread_mutex_lock(lock)

    return wait


def train(where: str, mark: str, arguments: Sequence[str]) -> None:
    """Train with a wait in ``where``: the name of a function that cfvlm_ds.training.run or trainer calls, or "evaluation"."""
    if where == "evaluation":
        forward = DeepSpeedEngine.forward

        def slow(self: Any, *inputs: Any, **named: Any) -> Any:
            if not self.module.training and Path(mark).parent.joinpath("begun").exists():
                Path(mark).touch()
                time.sleep(0.5)
            return forward(self, *inputs, **named)

        DeepSpeedEngine.forward = slow
        tracker = run.tracker_of

        def begun(*details: Any) -> Any:  # the self-check before this point also runs forwards in evaluation mode
            Path(mark).parent.joinpath("begun").touch()
            return tracker(*details)

        run.tracker_of = begun
    else:
        module = run if hasattr(run, where) else trainer
        setattr(module, where, held(Path(mark), getattr(module, where)))
    train_script(arguments)
