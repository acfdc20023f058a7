"""A DeepSpeed checkpoint as an ordinary Hugging Face folder, with the same tensor names and dtypes as the model it started from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open

from cfvlm_ds.checkpoint import incomplete
from cfvlm_ds.config import ConfigError
from cfvlm_ds.models import load_processor


def export_hf(checkpoint: Path, source: str, out_dir: Path) -> Path:
    """Write the weights of ``checkpoint`` with the configuration and processor of ``source`` to ``out_dir``; needs no process group or GPU.

    The folder appears complete or not at all, and is read back: its tensors must have the source's names, shapes and dtypes, and the
    checkpoint's values. Raises ConfigError when the checkpoint is incomplete or does not fit the source.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from transformers import AutoModelForImageTextToText

    if defect := incomplete(checkpoint):
        raise ConfigError(f"{checkpoint}: {defect}; export another checkpoint")
    weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}  # the Scorer holds the model as .model
    # Outside ZeRO-3 and in its own dtype: this is the load whose saved names equal the source's.
    model = AutoModelForImageTextToText.from_pretrained(source, dtype="auto", device_map="cpu")
    own = model.state_dict()
    if missing := [name for name in own if name not in weights and not _tied(model, name)]:
        raise ConfigError(f"{checkpoint} does not fit {source}: {len(missing)} weights missing, such as {missing[0]}; name its source")
    with torch.no_grad():
        for name, tensor in own.items():
            if name in weights:
                tensor.copy_(weights[name])
    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    load_processor(source).save_pretrained(partial)
    _verify(partial, source)
    shutil.rmtree(out_dir, ignore_errors=True)
    os.replace(partial, out_dir)
    return out_dir


def _tied(model: torch.nn.Module, name: str) -> bool:
    return name in (getattr(model, "all_tied_weights_keys", None) or {})


def _verify(folder: Path, source: str) -> None:
    """Compare names, shapes and dtypes of the tensors on disk with the source's, where the source is a folder."""
    if not Path(source).is_dir():
        return
    written, expected = _tensors(folder), _tensors(Path(source))
    if written != expected:
        different = sorted(name for name in written.keys() | expected.keys() if written.get(name) != expected.get(name))
        raise ConfigError(f"export of {source} would change {len(different)} tensors' names, shapes or dtypes, such as {different[0]}")


def _tensors(folder: Path) -> dict[str, tuple[list[int], str]]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118  (not a dict)
                part = handle.get_slice(name)
                found[name] = (part.get_shape(), part.get_dtype())
    return found
