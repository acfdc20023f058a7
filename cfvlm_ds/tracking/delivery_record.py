"""Delivery record of a run: data for MLflow other than metrics, stored in the run folder so that another process can finish the
delivery.
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
"""Keys of a data set: its name in the configuration, digest of its identity, manifest, "training" or "evaluation", number of groups."""

Status = Literal["FINISHED", "FAILED", "KILLED", "SCHEDULED"]


@dataclass(frozen=True)
class DeliveryRecord:
    """Data for MLflow other than metrics, and the state of the delivery.

    Attributes:
        inputs: data sets of this start, each with the keys ``INPUT``.
        token: identifies the run if the response to its creation was lost.
        offset: bytes of metrics.jsonl that MLflow has.
        artifacts: path (relative if it is in the run folder) -> its ``folder`` in MLflow, and ``pending``: True until it is uploaded.
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
        """Return the record of a run folder, or None if there is none or a power loss has damaged it."""
        path = run_dir / RECORD_FILE
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            say(f"{path} is damaged and ignored; the run's id is taken from its checkpoint, if there is one")
            return None

    def save(self, run_dir: Path) -> str | None:
        """Write the record, and return the reason if it could not be written, else None."""
        path = run_dir / RECORD_FILE
        try:
            replace(path, json.dumps(dataclasses.asdict(self), indent=1).encode())
        except OSError as error:
            return unwritten(path, error)
        return None
