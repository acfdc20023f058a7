"""Export jobs. Each job lists tensors of the export and the model's weights from which they are computed. The tensors of a job without
weights are copied from the source.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.export.source import Saved
from cfvlm_ds.export.zero import ZeroWeights
from cfvlm_ds.models import family_of


@dataclass(frozen=True)
class Job:
    """Tensors to write (``stored``) and how to compute them: from the model's ``weights``, by reversing the ``conversions`` that
    transformers applies on loading. If ``conversions`` is None, the weight is stored unchanged. If ``weights`` is empty, the tensors are
    copied from the source.
    """

    stored: tuple[str, ...]
    weights: tuple[str, ...]
    conversions: list[Any] | None = None


def find_jobs(model: Any, saved: Mapping[str, Saved]) -> list[Job]:
    """Derive an export's jobs from transformers' loading rules. A tensor that the model does not load gets a job without weights.

    Each reversed conversion is tried on meta tensors, and used only if it yields the source's names and shapes. Raises ConfigError if none
    does.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    own, prefix = model.state_dict(), model.base_model_prefix
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    jobs: list[Job] = []
    converted: dict[str, tuple[Any, list[str]]] = {}
    for name in sorted(saved, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if renamed not in own and name in own:
            renamed, pattern = rename_source_key(name, [], [], prefix, own)
        if renamed not in own or pattern is None:
            jobs.append(Job((name,), (renamed,) if renamed in own else ()))
            continue
        if renamed not in converted:
            converted[renamed] = copy.deepcopy(next(c for c in converters if pattern in c.source_patterns)), []
        converted[renamed][0].add_tensor(renamed, name, pattern, torch.empty(saved[name].shape, device="meta"))
        converted[renamed][1].append(name)
    used = [entry for entry in mapping if entry.was_used()]
    # When reversed, Transpose(check_dims=True) skips a weight that already has the model's shape, although loading transposed it.
    transposing = copy.deepcopy(used)
    for operation in (operation for entry in transposing for operation in getattr(entry, "operations", ())):
        if hasattr(operation, "check_dims"):
            operation.check_dims = False

    for first, (converter, names) in converted.items():
        weights, shapes = tuple(converter.convert(first, model=model, config=model.config)), {name: saved[name].shape for name in names}
        for conversions in (used, transposing):
            try:
                reverted = revert(model, conversions, {name: own[name] for name in weights})
            except (RuntimeError, ValueError):  # raised when tensors are missing
                continue
            if {name: tuple(tensor.shape) for name, tensor in reverted.items()} == shapes:
                jobs.append(Job(tuple(names), weights, conversions))
                break
        else:
            raise ConfigError(f"transformers cannot convert {weights[0]} back to the source's {names[0]}; update transformers")
    return jobs


def revert(model: Any, conversions: list[Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    model._weight_conversions = conversions or None
    return revert_weight_conversion(model, tensors)


def fill(jobs: list[Job], model: Any, zero: ZeroWeights, checkpoint: Path, source: str) -> list[Job]:
    """Return the jobs, with ``weights`` emptied where the checkpoint lacks them, for example because the module is frozen. The export
    copies the tensors of such a job from the source.

    Each tied weight is added to ``zero`` (the checkpoint's weights) under all its names. Raises ConfigError if a trained weight is missing,
    if the checkpoint has a trained weight that the source lacks, or if shapes differ.
    """
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    for names in tied.values():
        if name_in_checkpoint := next((name for name in names if name in zero.weights), None):
            for name in names:
                zero.weights.setdefault(name, zero.weights[name_in_checkpoint])
    misfit = f"{checkpoint} does not fit {source}"
    for name, parameter in model.state_dict().items():
        if name in zero.weights and zero.weights[name].shape != tuple(parameter.shape):
            raise ConfigError(
                f"{misfit}: {name} has shape {list(zero.weights[name].shape)}, not {list(parameter.shape)}; use its base model"
            )
    written = {id(zero.weights[name]) for job in jobs for name in job.weights if name in zero.weights}
    if foreign := sorted(name for name in zero.trained if id(zero.weights[name]) not in written):
        raise ConfigError(f"{misfit}: {len(foreign)} trained weights do not exist there, such as {foreign[0]}; use its base model")
    filled = []
    for job in jobs:
        if missing := [name for name in job.weights if name not in zero.weights]:
            module_of = family_of(model.config).module_of
            trained = {module_of(name) for name in zero.trained}
            if lost := [name for name in missing if len(missing) < len(job.weights) or module_of(name) in trained]:
                raise ConfigError(
                    f"{misfit}: {len(lost)} or more trained weights are missing, such as {lost[0]}; export another checkpoint"
                )
            job = Job(job.stored, ())
        filled.append(job)
    return filled
