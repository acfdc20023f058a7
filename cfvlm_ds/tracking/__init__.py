"""What a run measures: metrics.jsonl, its delivery to MLflow, and figures."""

from __future__ import annotations

from cfvlm_ds.tracking.mlflow_delivery import deliver, import_mlflow
from cfvlm_ds.tracking.tracker import NullTracker, Tracker, going_on, open_tracker

__all__ = ["NullTracker", "Tracker", "deliver", "going_on", "import_mlflow", "open_tracker"]
