"""Pretrained base model of the demo: a small LLaVA that recognises things but relies on habits. `make base` trains it."""

from __future__ import annotations

import shutil
from pathlib import Path

from cfvlm_ds.core.files import whole_folder
from cfvlm_ds.core.untrusted import refuse_filled

FOLDER = Path(__file__).resolve().parent / "base_checkpoint"


def write_base(out_dir: str | Path) -> Path:
    """Copy the base model to ``out_dir`` unless it already contains a model, and return ``out_dir``.

    Raises ConfigError if ``out_dir`` contains other files.
    """
    out = Path(out_dir)
    if (out / "config.json").exists():
        return out
    refuse_filled(out)
    with whole_folder(out) as partial:
        shutil.copytree(FOLDER, partial, dirs_exist_ok=True)
    return out
