"""Export of a DeepSpeed checkpoint as a Hugging Face folder with the same files, tensor names, shapes and dtypes as the source model.

The model is never loaded as a whole. Each weight is read in blocks from the ranks' files, cast, and written at its offset in the output. An
export therefore needs a few hundred MiB of memory, regardless of the model's size. If transformers converts weights when it loads them, the
export also needs memory for one layer.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cfvlm_ds.checkpoint import incomplete
from cfvlm_ds.core.config import LoraConfig
from cfvlm_ds.core.errors import ConfigError, StorageError
from cfvlm_ds.core.files import create
from cfvlm_ds.core.progress import Alive, Say, no_op
from cfvlm_ds.core.secrets import print_line
from cfvlm_ds.core.untrusted import replaced
from cfvlm_ds.export.adapters import MergedWeights, export_adapter
from cfvlm_ds.export.files import Files, write_index
from cfvlm_ds.export.folder import place_card
from cfvlm_ds.export.jobs import Job, fill, find_jobs, revert
from cfvlm_ds.export.source import Saved, read_saved, skeleton
from cfvlm_ds.export.zero import BLOCK, ZeroWeights
from cfvlm_ds.models import model_folder
from cfvlm_ds.models.model_files import INDEX, SINGLE, check_files, side_files


def export_hf(
    checkpoint: Path,
    source: str,
    out_dir: Path,
    say: Say = print_line,
    lora: LoraConfig | None = None,
    alive: Alive = no_op,
    card: str | None = None,
) -> Path:
    """Write the weights of ``checkpoint`` with the configuration and processor of ``source`` to ``out_dir``, and return ``out_dir``.

    The export needs no process group and no GPU. Adapters are merged into the base weights; ``lora`` is their configuration. ``alive`` is
    called regularly during the export. ``card`` becomes the folder's README.md unless the user has written one.

    The folder is written under a temporary name and replaces an older export only when it is complete. Weights have the source's names,
    shapes and dtypes. Raises ConfigError if the checkpoint is incomplete, lacks a trained weight or does not match the source, and
    StorageError if the folder cannot be written.
    """
    if defect := incomplete(checkpoint):
        raise ConfigError(f"{checkpoint}: {defect}; export another checkpoint")
    if lora and lora.load_in_4bit:
        raise ConfigError(f"{checkpoint} has a 4-bit base; export its adapters with --adapter, and merge them into {source} with peft")
    model = skeleton(source)
    folder = model_folder(source)
    check_files(folder)
    saved, metadata = read_saved(folder, model)
    zero = MergedWeights(checkpoint, lora)
    jobs = fill(find_jobs(model, saved), model, zero, checkpoint, source)
    if copied := [name for job in jobs if not job.weights for name in job.stored]:
        if not any((folder / name).is_file() for name in (SINGLE, INDEX)):
            raise ConfigError(
                f"{checkpoint} lacks {copied[0]}, and {source} has no safetensors to copy it from; use a source with safetensors"
            )
        say(f"export: {len(copied)} tensors that are not in the checkpoint are copied from {source}, such as {copied[0]}")
    with replaced(out_dir, "config.json", (folder, checkpoint.resolve())) as partial:
        _refuse_full_disk(partial, out_dir, sum(tensor.nbytes for tensor in saved.values()))
        _copy_files(folder, partial)
        files = Files(partial, saved, say, alive)
        _write(files, saved, jobs, model, zero, folder)
        write_index(partial, saved, metadata)
        place_card(partial, out_dir, card)
    return out_dir


def _refuse_full_disk(partial: Path, out_dir: Path, needed: int) -> None:
    if (free := shutil.disk_usage(partial).free) < needed:
        raise StorageError(
            f"{out_dir} needs {needed / 1e9:.1f} GB, but its disk has only {free / 1e9:.1f} GB free; name another folder with --out"
        )


def _copy_files(folder: Path, partial: Path) -> None:
    """Copy the source's configuration, tokenizer and processor files."""
    for path in side_files(folder):
        target = partial / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        with path.open("rb") as source, create(target) as copy:
            shutil.copyfileobj(source, copy)


def _write(files: Files, saved: Mapping[str, Saved], jobs: Iterable[Job], model: Any, zero: ZeroWeights, folder: Path) -> None:
    for job in jobs:
        if not job.weights:
            for name in job.stored:
                with safe_open(folder / (SINGLE if (folder / SINGLE).is_file() else saved[name].file), framework="pt") as handle:
                    files.write(name, _blocks(handle.get_tensor(name)))
        elif job.conversions is None:
            files.write(job.stored[0], zero.blocks(job.weights[0]))
        else:
            dtypes = {saved[name].dtype for name in job.stored}
            dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
            for name, tensor in revert(model, job.conversions, {name: zero.tensor(name, dtype) for name in job.weights}).items():
                files.write(name, _blocks(tensor))


def _blocks(tensor: Tensor) -> Iterable[Tensor]:
    return tensor.reshape(-1).split(BLOCK)
