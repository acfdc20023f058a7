"""What lmms-eval finds when this package is installed beside it: a model named ``cfvlm_ds``."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What the entry point ``lmms_eval.models`` names; lmms-eval calls it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="cfvlm_ds", simple_class_path="cfvlm_ds.cli.lmms_model.LmmsModel")
