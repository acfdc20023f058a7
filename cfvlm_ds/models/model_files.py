"""Listing and validation of the files in an untrusted model folder: names, links and completeness."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from cfvlm_ds.core.errors import ConfigError, OutOfMemory, StorageError, is_failure
from cfvlm_ds.core.reading import MALFORMED, read_json
from cfvlm_ds.core.untrusted import bare_name, refuse_foreign

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED_INDEX = "pytorch_model.bin.index.json"
COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*", "additional_chat_templates/*")
_NOT_COPIED = ("*.index.json", "trainer_state.json", "adapter_config.json")


def check_files(folder: Path) -> None:
    """Check a model folder without reading its weights. Raises ConfigError for a weight file that is truncated or listed but missing, a
    folder with both a model and adapters, a link that leads out of the folder, or an index that lists a path instead of a file name.
    """
    for path in sorted({path for pattern in COPIED for path in folder.glob(pattern)}):
        refuse_foreign(path, folder)
    if (folder / "adapter_config.json").is_file() and (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} contains both a model and adapters, and transformers would load the base of the adapters instead; move "
            "them to separate folders"
        )
    for name in weight_files(folder):
        header(folder / name)
    if (folder / _PICKLED_INDEX).is_file() and not weight_files(folder):
        read_index(folder / _PICKLED_INDEX, ".bin")


def side_files(folder: Path) -> Iterator[Path]:
    """Yield a model's files other than its weights, such as those of the configuration, the tokenizer and the processor."""
    for path in sorted({path for pattern in COPIED for path in folder.glob(pattern)}):
        if path.is_file() and not any(path.match(other) for other in _NOT_COPIED):
            yield path


def weight_files(folder: Path) -> list[str]:
    """Return the names of the model's safetensors files. The list is empty for other weight formats. Raises ConfigError for an invalid
    index.
    """
    if (folder / SINGLE).is_file():
        return [SINGLE]
    return sorted(set(read_index(folder / INDEX, ".safetensors")[0].values())) if (folder / INDEX).is_file() else []


def weight_patterns(files: Iterable[str]) -> list[str]:
    """Return glob patterns for the weight files to download from a hub repository that contains ``files``. As in transformers, pickled
    weights are only a fallback.
    """
    if SINGLE in (names := set(files)):
        return [SINGLE]
    return ["*.safetensors"] if INDEX in names else ["*.safetensors", "*.bin"]


def hashed_files(folder: Path) -> list[Path]:
    """Return the paths of the model's weight files: safetensors or, if there are none, pickled weights."""
    return [folder / name for name in weight_files(folder)] or sorted(path for path in folder.glob("*.bin") if path.is_file())


def read_index(path: Path, ending: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Read a weight index and return (tensor name -> file name, metadata). Raises ConfigError if the index is invalid or lists a missing
    file.
    """
    remedy = "download the model again"
    try:
        index = read_json(path)
        weight_map = index["weight_map"]
    except MALFORMED as error:
        raise ConfigError(f"{path} is not a valid index of weights ({type(error).__name__}: {error}); {remedy}") from error
    metadata = index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise ConfigError(f"{path} is not a valid index of weights (weight_map and metadata must be objects); {remedy}")
    for name in sorted({bare_name(file, path, ending) for file in weight_map.values()}):
        if not (path.parent / name).is_file():
            raise ConfigError(f"{path.parent / name} is listed in {path.name} but missing; {remedy}")
    return weight_map, metadata


def header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Read a safetensors header and return tensor name -> (shape, dtype), in the order of the file. Raises ConfigError for an invalid or
    truncated file.
    """
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    try:
        with safe_open(path, framework="pt") as handle:
            for name in handle.offset_keys():
                tensor = handle.get_slice(name)
                tensors[name] = tuple(tensor.get_shape()), tensor.get_dtype()
    except (OSError, SafetensorError, ValueError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"{path} cannot be read ({reason}); download it again, or correct its permissions") from error
    return tensors


@contextlib.contextmanager
def explained(what: str, remedy: str) -> Iterator[None]:
    """Convert exceptions that libraries raise within the block to a ConfigError with the message "``what`` (reason); ``remedy``".

    Libraries barely validate a model folder, so an invalid value can raise any exception. Machine errors, such as running out of memory,
    and errors of other ranks are not converted.
    """
    try:
        yield
    except (ConfigError, StorageError, OutOfMemory, MemoryError, torch.OutOfMemoryError, dist.DistError):
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        reason = " ".join(str(error).split()) or "no reason given"
        raise ConfigError(f"{what} ({type(error).__name__}: {reason[:_LONGEST_REASON]}); {remedy}") from error


_LONGEST_REASON = 600  # characters
