"""Functions for forked ranks, with injected faults or counters (see forkserver_ranks.py)."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cfvlm_ds import engine
from cfvlm_ds.batching import image_source
from cfvlm_ds.cli.train import run
from cfvlm_ds.cluster.heartbeat import Heartbeat
from cfvlm_ds.core.distributed import World
from cfvlm_ds.core.errors import DataError
from cfvlm_ds.models import forest_attention as attention
from cfvlm_ds.training.samples import Samples


def stand_still(folder: Path, ended: bool) -> None:
    """Make rank 2 of 3 hang or, if ``ended``, exit while it reads data. The other ranks wait for it."""
    rank = int(os.environ["RANK"])
    (folder / f"ready-{rank}").touch()
    while len(list(folder.glob("ready-*"))) < 3:  # in a run, the process group does this
        time.sleep(0.01)
    with Heartbeat(folder, World(rank, 3, torch.device("cpu")), 4.0) as pulse:
        pulse.mark("data", 7)
        if rank < 2:
            pulse.mark("agreement", 7)
        if rank < 2 or not ended:
            time.sleep(60)


def seeing_siblings(options: Sequence[str]) -> None:
    """Train with a faulty attention in which an image's texts attend to each other."""
    right = attention._padded
    attention._padded = lambda forest, *sight: right(
        attention.Forest(forest.lengths, tuple(node - 1 if parent >= 0 else -1 for node, parent in enumerate(forest.parents))), *sight
    )
    run(options)


def losing_pictures(options: Sequence[str]) -> None:
    """Train, but make pictures unreadable on rank 1 while samples are written."""
    write, opened = Samples.write, image_source.open_image

    def lost(path: Path, *limits: int) -> None:
        raise DataError(f"{path}: lost on rank 1")

    def writing(samples: Samples, step: int) -> None:
        image_source.open_image = lost if samples.world.rank else opened
        write(samples, step)
        image_source.open_image = opened

    Samples.write = writing
    run(options)


def counted(trainings: Sequence[list[str]]) -> None:
    """Execute training runs, and print how often the first blocks of the tower and the language model ran in training mode."""
    initialize, tower, language = engine.initialize, list[int](), list[int]()

    def counting(*arguments: Any) -> Any:
        built = initialize(*arguments)
        model = built.module.model.model
        for calls, layers in ((tower, model.vision_tower.encoder.layers), (language, model.language_model.layers)):
            calls.append(0)
            layers[0].mlp.register_forward_pre_hook(lambda *_, c=calls: c.__setitem__(-1, c[-1] + model.training))
        return built

    engine.initialize = counting
    for arguments in trainings:
        run(arguments)
    print("tower", tower, "language", language)


def traced(trainings: Sequence[list[str]]) -> None:
    """Execute training runs, and print for each step how often the order of modules differed from the one that ZeRO-3 had recorded."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    from cfvlm_ds.training.step import OptimizerStep

    right, take, invalid = Coordinator._invalidate_trace, OptimizerStep.take, [0]

    def invalidated(self: Any) -> None:
        invalid[-1] += 1
        right(self)

    def counting(self: Any, *given: Any, **named: Any) -> Any:
        invalid.append(0)
        return take(self, *given, **named)

    Coordinator._invalidate_trace = invalidated
    OptimizerStep.take = counting  # type: ignore[method-assign]
    for arguments in trainings:
        run(arguments)
        print("invalidated", invalid[1:])
        invalid[:] = [0]
