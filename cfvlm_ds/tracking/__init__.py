"""Run tracking: metrics.jsonl, delivery to MLflow, and figures."""

from __future__ import annotations

from cfvlm_ds.tracking.mlflow_delivery import deliver, import_mlflow
from cfvlm_ds.tracking.tracker import NullTracker, Tracker, open_tracker
