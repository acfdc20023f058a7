"""Checkpoints: atomic saving, discovery, verification, and resharding for a different number of ranks."""

from __future__ import annotations

from cfvlm_ds.checkpoint.finding import damaged, description, find, incomplete, newest
from cfvlm_ds.checkpoint.loading import kept_state, load
from cfvlm_ds.checkpoint.saving import SaveError, save
from cfvlm_ds.checkpoint.state import SCHEMA, TrainState, refuse_other_version
