"""Delivery record: the data that a run sends to MLflow (other than metrics), and what has been delivered so far. It is stored in the run
folder, so that another process can finish the delivery.
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cfvlm_ds.core.errors import unwritten
from cfvlm_ds.core.files import replace
from cfvlm_ds.tracking.metrics_log import say

RECORD_FILE = ".mlflow_delivery.json"

INPUT = ("name", "digest", "source", "context", "groups")
"""Keys of a data set's entry: name in the configuration, digest of its identity, manifest, "training" or "evaluation", number of groups."""

Status = Literal["FINISHED", "FAILED", "KILLED", "SCHEDULED"]


@dataclass(frozen=True)
class DeliveryRecord:
    """The data that a run sends to MLflow (other than metrics), and what has been delivered so far.

    Attributes:
        inputs: data sets used since the latest start of the run, each a dict with the keys listed in ``INPUT``.
        token: random id, used to find the run on the server if the response to the create request was lost.
        offset: number of bytes of metrics.jsonl that have been delivered.
        artifacts: maps a file's path (relative if in the run folder) to its ``folder`` in MLflow and to ``pending`` (True until it is
            uploaded).
    """

    experiment: str = ""
    run_name: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, Any] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    run_id: str | None = None
    start_ms: int = 0
    resume_step: int | None = None
    offset: int = 0
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    status: Status | None = None
    end_ms: int | None = None

    @classmethod
    def load(cls, run_dir: Path) -> DeliveryRecord | None:
        """Read the record in a run folder. Return None if there is no record or a power loss has damaged it."""
        path = run_dir / RECORD_FILE
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            say(f"{path} is damaged and ignored; the run's id is taken from its checkpoint, if there is one")
            return None

    def save(self, run_dir: Path) -> str | None:
        """Write the record. Return None, or the reason if it cannot be written."""
        path = run_dir / RECORD_FILE
        try:
            replace(path, json.dumps(dataclasses.asdict(self), indent=1).encode())
        except OSError as error:
            return unwritten(path, error)
        return None
