"""Entry point for lmms-eval: if both packages are installed, lmms-eval has a model named ``cfvlm_ds``."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Return the model's manifest. lmms-eval calls this function through the entry point ``lmms_eval.models``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="cfvlm_ds", simple_class_path="cfvlm_ds.cli.lmms_model.LmmsModel")
