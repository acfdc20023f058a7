"""Lock for a run folder: a file that is locked by the process using the folder and that identifies this process. The lock is released when
the process exits or crashes.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from cfvlm_ds.core.errors import ConfigError, writing
from cfvlm_ds.core.files import create_locked, is_same

NAME = "run.lock"


class RunLock:
    """Lock on ``folder/run.lock``, held from construction until ``release`` or the end of the ``with`` block.

    If another run holds the lock, raises a ConfigError that names the holder.
    """

    def __init__(self, folder: Path, option: str = "train.output_dir") -> None:
        self.path, own = folder / NAME, _identity()
        with writing(self.path, f"free some space, or choose another, writable {option}"):
            folder.mkdir(parents=True, exist_ok=True)
            while (descriptor := create_locked(self.path)) is None:
                holder = _holder(self.path)
                if not own["job"] or holder.get("job") != own["job"] or holder.get("restart") == own["restart"]:
                    raise ConfigError(
                        f"{folder} is in use by {_named(holder)}; choose another {option}, or remove {self.path} if that run has ended"
                    )
                # Slurm never runs a job twice at the same time, so the holder is an earlier start of this job on a node that is down.
                self.path.unlink(missing_ok=True)
            self._held = descriptor
            os.write(descriptor, json.dumps(own).encode())
        os.register_at_fork(after_in_child=self._close)  # a data worker may briefly outlive its rank

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Remove the lock file and release the lock."""
        with contextlib.suppress(OSError):  # an error here must not hide the reason why the run ends
            if self._held >= 0 and is_same(self.path, self._held):
                self.path.unlink()
        self._close()

    def _close(self) -> None:
        descriptor, self._held = self._held, -1
        if descriptor >= 0:
            os.close(descriptor)


def _identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _holder(lock: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(lock.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "an unidentified run"
    job = f", Slurm job {holder['job']}" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}, started {holder.get('started')}"
