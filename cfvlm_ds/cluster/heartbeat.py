"""Hang detection by heartbeats: every rank updates a small file in the run folder, and watches the files of all ranks.

A thread writes ``heartbeat/rank-N.json`` at regular intervals, even while the rank waits in a collective. There are two kinds of hang:

- in any phase, a rank has not written a heartbeat for ``timeout_s``, because its process is stopped or its node is lost;
- no rank has entered a new phase or micro-batch for ``timeout_s``, and the rank that is furthest behind is in the middle of a training
  step. Start-up, checkpoints, evaluation and export can take any amount of time; only the timeout of collectives limits them.

The first rank that detects a hang prints a message and writes it to ``heartbeat/hang.txt``. Every rank that detects the hang exits with
``EXIT_HANG``, so that the launcher terminates the job. Each rank uses its own clock to measure how long a file has been unchanged, so
clocks of different machines are never compared.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfvlm_ds.cluster.signals import EXIT_HANG
from cfvlm_ds.core.distributed import World
from cfvlm_ds.core.errors import unwritten, writing
from cfvlm_ds.core.files import remove
from cfvlm_ds.core.secrets import print_line

FOLDER, HANG_FILE = "heartbeat", "hang.txt"
BOUNDED = ("data", "agreement", "computation")
"""Phases of a training step, in which a rank must make progress within ``timeout_s``."""
ENDED = "ended"
_RECORD_BYTES = 512  # the record has a fixed size and is overwritten in place, so a full disk does not silence a healthy rank


def prepare(run_dir: Path) -> Path:
    """Create an empty heartbeat folder and return its path. Rank 0 calls this before any rank writes a heartbeat. Raises StorageError if
    the folder cannot be written.
    """
    folder = run_dir / FOLDER
    with writing(folder, "free some space, or choose another, writable train.output_dir"):
        remove(folder)
        folder.mkdir(parents=True)  # heartbeats or a hang report from an earlier start would count for this start
    return folder


@dataclass
class Peer:
    """State of a rank as observed by this process: its last record, the seconds since its last heartbeat, and the seconds since its last
    progress.
    """

    record: dict[str, Any] | None = None
    silent_s: float = 0.0
    still_s: float = 0.0

    def update(self, record: dict[str, Any] | None, elapsed_s: float) -> None:
        """Update the state with the rank's current record, or None if it cannot be read. ``elapsed_s`` is the time in seconds since the
        previous update.
        """
        old = self.record or {}
        new = record or old
        self.silent_s = 0.0 if new.get("beat") != old.get("beat") else self.silent_s + elapsed_s
        self.still_s = 0.0 if new.get("moves") != old.get("moves") else self.still_s + elapsed_s
        self.record = record or self.record


def verdict(peers: Sequence[Peer], timeout_s: float) -> tuple[int, str] | None:
    """Return the hung rank and a sentence that describes the hang, or None if no rank is hung."""
    for rank, peer in enumerate(peers):
        if peer.silent_s > timeout_s and not _ended(peer):
            return rank, f"{_name(rank, peer)} has given no sign of life for {peer.silent_s:.0f} s; {_place(peer)}"
    running = [rank for rank, peer in enumerate(peers) if peer.record is not None and not _ended(peer)]
    if not running or any(peers[rank].still_s <= timeout_s for rank in running):
        return None
    last = min(running, key=lambda rank: peers[rank].record["moves"])  # type: ignore[index]
    record = peers[last].record
    if record is None or record["phase"] not in BOUNDED:
        return None
    ahead = sum(peers[rank].record["moves"] > record["moves"] for rank in running)  # type: ignore[index]
    others = f"{ahead} of {len(peers)} ranks wait for it" if ahead else "no rank is ahead of it"
    return last, f"{_name(last, peers[last])} has made no progress for {peers[last].still_s:.0f} s; {_place(peers[last])}; {others}"


def _ended(peer: Peer) -> bool:
    return peer.record is not None and peer.record["phase"] == ENDED


def _name(rank: int, peer: Peer) -> str:
    return f"rank {rank}" + (f" on {peer.record['host']} (pid {peer.record['pid']})" if peer.record else "")


def _place(peer: Peer) -> str:
    return f"it was at step {peer.record['step']}, phase {peer.record['phase']}" if peer.record else "it never sent a heartbeat"


class Heartbeat:
    """Context manager that writes this rank's heartbeat and watches the other ranks.

    Args:
        folder: the folder that ``prepare`` returned on rank 0.
        timeout_s: maximum time in seconds without a heartbeat, or without progress within a step; 0 disables the heartbeat.
    """

    def __init__(self, folder: Path, world: World, timeout_s: float) -> None:
        self._folder, self._rank, self._timeout_s = folder, world.rank, timeout_s
        self._own: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "moves": 0,
            "step": 0,
            "phase": "start-up",
        }
        self._peers = [Peer() for _ in range(world.size)]
        self._interval = min(30.0, timeout_s / 20)
        self._over = threading.Event()
        self._silenced = False
        self._thread = threading.Thread(target=self._run, name="cfvlm_ds-heartbeat", daemon=True)

    def mark(self, phase: str, step: int) -> None:
        """Record that this rank enters ``phase`` of optimizer step ``step``. All ranks must make the same sequence of calls. A call takes
        about a microsecond.
        """
        self._own = {**self._own, "phase": phase, "step": step, "moves": self._own["moves"] + 1}

    def __enter__(self) -> Heartbeat:
        if self._timeout_s > 0:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._timeout_s > 0:
            self._over.set()
            self._thread.join()
            self.mark(ENDED, self._own["step"])
            self._beat(0)

    def _run(self) -> None:
        beat, looked = 0, time.monotonic()
        while True:
            beat += 1
            self._beat(beat)
            if self._over.wait(self._interval):
                return
            now = time.monotonic()
            # Time during which this process or its file system stalled does not count against the other ranks.
            elapsed_s, looked = min(now - looked, 2 * self._interval), now
            for rank, peer in enumerate(self._peers):
                peer.update(self._own | {"beat": beat} if rank == self._rank else self._read(rank), elapsed_s)
            if hang := verdict(self._peers, self._timeout_s):
                self._leave(*hang)

    def _beat(self, beat: int) -> None:
        record = json.dumps(self._own | {"beat": beat}).ljust(_RECORD_BYTES).encode()
        path = self._folder / f"rank-{self._rank}.json"
        try:
            path.parent.mkdir(exist_ok=True)  # the folder may have been deleted
            file = os.open(path, os.O_WRONLY | os.O_CREAT)
            try:
                os.pwrite(file, record, 0)
            finally:
                os.close(file)
            self._silenced = False
        except OSError as error:
            if not self._silenced:
                print_line(f"warning: {unwritten(path, error)}; meanwhile, other ranks may assume that this one hangs", error=True)
            self._silenced = True

    def _read(self, rank: int) -> dict[str, Any] | None:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self._folder / f"rank-{rank}.json").read_bytes())
        return None

    def _leave(self, rank: int, sentence: str) -> None:
        first = True
        try:
            with (self._folder / HANG_FILE).open("x") as file:
                file.write(sentence + "\n")
        except OSError as error:
            first = not isinstance(error, FileExistsError)
        if first:
            print_line(f"error: {sentence}", error=True)
        if rank == self._rank:
            faulthandler.dump_traceback()  # shows in the log where the rank is stuck
        os._exit(EXIT_HANG)
