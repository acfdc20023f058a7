"""What MLflow is to know of a run besides its metrics, kept in the run folder so that another process can deliver it."""

from __future__ import annotations

import dataclasses
import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cfvlm_ds.core.errors import unwritten
from cfvlm_ds.core.files import replace
from cfvlm_ds.core.reading import read_json
from cfvlm_ds.tracking.metrics_log import say

RECORD_FILE = ".mlflow_delivery.json"


INPUT: dict[str, type] = {"name": str, "digest": str, "source": str, "context": str, "groups": int}
"""Of a data set: what the configuration calls it, the digest of its identity, its manifest, training or evaluation, its size."""

Status = Literal["FINISHED", "FAILED", "KILLED", "SCHEDULED"]


@dataclass
class Record:
    """What MLflow is to know besides the metrics, and how far delivery got; on disk so that another process can go on."""

    experiment: str = ""
    run_name: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, Any] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    """The data sets of this start, see ``INPUT``."""
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Finds the run again when the answer to its creation was lost."""
    run_id: str | None = None
    start_ms: int = 0
    resume_step: int | None = None
    offset: int = 0
    """Bytes of metrics.jsonl that have been delivered."""
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    status: Status | None = None
    end_ms: int | None = None

    @classmethod
    def load(cls, run_dir: Path) -> Record | None:
        """None where there is none, and where a power loss has left something else in its place."""
        path = run_dir / RECORD_FILE
        try:
            record = cls(**read_json(path))
            whole = all(isinstance(getattr(record, name), kinds) for name, kinds in _KINDS.items())
            whole = whole and record.offset >= 0 and all(artifact.keys() == {"path", "folder", "pending"} for artifact in record.artifacts)
            whole = whole and all(each.keys() == INPUT.keys() for each in record.inputs)
            whole = whole and all(isinstance(each[name], kind) for each in record.inputs for name, kind in INPUT.items())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            whole = False
        if not whole:
            say(f"{path} is damaged and left aside; what MLflow has is asked of it where a checkpoint knows the run")
            return None
        foreign = record.keep_own_artifacts(run_dir)
        if any(each["pending"] for each in foreign):
            say(f"{path} lists files that are not the run's, such as {foreign[0]['path']}; MLflow does not get them")
        return record

    def begin(
        self,
        experiment: str,
        run_name: str,
        params: dict[str, Any],
        tags: dict[str, Any],
        inputs: list[dict[str, Any]],
        resume_step: int | None,
    ) -> None:
        """A start of the run, which is not over then."""
        self.experiment, self.run_name, self.params, self.tags, self.inputs = experiment, run_name, params, tags, inputs
        self.resume_step, self.status, self.end_ms = resume_step, None, None

    def end(self, status: Status, end_ms: int) -> None:
        """The run is over, or will go on later."""
        self.status, self.end_ms = status, end_ms

    def delivered_to(self, offset: int) -> None:
        """So many bytes of metrics.jsonl are on the server."""
        self.offset = offset

    def known_as(self, run_id: str) -> None:
        """The server's name for the run."""
        self.run_id = run_id

    def start_over(self) -> None:
        """The server has lost the run: a new one gets everything."""
        self.tags = {**self.tags, "continues_run": self.run_id}
        self.run_id, self.offset, self.token = None, 0, uuid.uuid4().hex
        self.artifacts = [{**artifact, "pending": True} for artifact in self.artifacts]

    def add_artifact(self, path: str, folder: str) -> None:
        """A file to be uploaded into ``folder``; the same one again has changed."""
        others = [each for each in self.artifacts if (each["path"], each["folder"]) != (path, folder)]
        self.artifacts = [*others, {"path": path, "folder": folder, "pending": True}]

    def keep_own_artifacts(self, run_dir: Path) -> list[dict[str, Any]]:
        """Leave out, and return, files that are not of the run folder."""
        foreign = [each for each in self.artifacts if not _inside(run_dir, each["path"])]
        self.artifacts = [each for each in self.artifacts if each not in foreign]
        return foreign

    def kept(self, run_dir: Path) -> str | None:
        """Write it; why it could not be written, or None."""
        path = run_dir / RECORD_FILE
        try:
            replace(path, json.dumps(dataclasses.asdict(self), indent=1).encode())
        except OSError as error:
            return unwritten(path, error)
        return None


def _inside(run_dir: Path, path: Any) -> bool:
    """Whether a file is of the run folder, links followed: a record may be somebody else's, and list a private key."""
    try:
        return (run_dir / path).resolve().is_relative_to(run_dir.resolve())
    except (OSError, ValueError, TypeError, RuntimeError):
        return False


_KINDS: dict[str, Any] = {
    **dict.fromkeys(("experiment", "run_name", "token"), str),
    **dict.fromkeys(("params", "tags"), dict),
    **dict.fromkeys(("run_id", "status"), (str, type(None))),
    **dict.fromkeys(("resume_step", "end_ms"), (int, type(None))),
    **dict.fromkeys(("start_ms", "offset"), int),
    **dict.fromkeys(("artifacts", "inputs"), list),
}
