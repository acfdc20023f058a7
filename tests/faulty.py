"""Trainings with planted faults, in one process family: each line of the file is one's {"fault": NAME, "arguments": [options]}.

What a training raises is printed by every rank, and the next one starts.
"""

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist

from cfvlm_ds import checkpoint
from cfvlm_ds.cli import run

RANK = int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def nothing() -> Iterator[None]:
    yield


@contextlib.contextmanager
def full_disk(*steps: int) -> Iterator[None]:
    """At these steps rank 1 cannot write files of more than 50 KB: the system itself refuses."""
    save = checkpoint.save

    def limited(engine, state, *arguments):  # type: ignore[no-untyped-def]
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if RANK == 1 and state.step in steps:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            return save(engine, state, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with patch.object(checkpoint, "save", limited):
        yield


def between() -> None:
    """Wait until every rank has said what it has to say."""
    dist.barrier()
    time.sleep(0.2)
    if RANK == 0:
        print("=== next training", flush=True)
    dist.barrier()


FAULTS = {"nothing": nothing, "full disk": full_disk}

if __name__ == "__main__":
    for index, line in enumerate(Path(sys.argv[-1]).read_text().splitlines()):
        if index:
            between()
        planned = json.loads(line)
        name, *details = planned["fault"]
        try:
            with FAULTS[name](*details):
                run(planned["arguments"])
        except Exception as error:
            print(f"rank {RANK} raised {type(error).__name__}: {error}", flush=True)
