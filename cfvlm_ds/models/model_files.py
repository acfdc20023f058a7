"""The untrusted files of a model folder: their names, where links lead, and whether the weights are all there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from cfvlm_ds.core.errors import ConfigError, OutOfMemory, StorageError, is_failure
from cfvlm_ds.core.reading import read_json
from cfvlm_ds.core.untrusted import bare_name, refuse_foreign

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED_INDEX = "pytorch_model.bin.index.json"
COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*", "additional_chat_templates/*")
_NOT_COPIED = ("*.index.json", "trainer_state.json", "adapter_config.json")


def check_files(folder: Path) -> None:
    """Raise ConfigError naming a file that cannot be a model's: a name that is a path, a link that leads elsewhere, weights that are
    missing or truncated. Reads no weight."""
    for path in sorted({path for pattern in COPIED for path in folder.glob(pattern)}):
        refuse_foreign(path, folder)
    if (folder / "adapter_config.json").is_file() and (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} holds a model and adapters, and transformers would load the adapters' own base in its place; put them into folders "
            "of their own"
        )
    for name in weight_files(folder):
        header(folder / name)
    if (folder / _PICKLED_INDEX).is_file() and not weight_files(folder):
        read_index(folder / _PICKLED_INDEX, ".bin")


def side_files(folder: Path) -> Iterator[Path]:
    """Configuration, tokenizer and processor files: what a model has beside its weights."""
    for path in sorted({path for pattern in COPIED for path in folder.glob(pattern)}):
        if path.is_file() and not any(path.match(other) for other in _NOT_COPIED):
            yield path


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that make up the model; none where its weights are stored otherwise. Raises ConfigError."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    return sorted(set(read_index(folder / INDEX, ".safetensors")[0].values())) if (folder / INDEX).is_file() else []


def weight_patterns(files: Iterable[str]) -> list[str]:
    """Which weight files of a hub model with these ``files`` to fetch: pickled ones only if it has no others, as transformers does."""
    if SINGLE in (held := set(files)):
        return [SINGLE]
    return ["*.safetensors"] if INDEX in held else ["*.safetensors", "*.bin"]


def hashed_files(folder: Path) -> list[Path]:
    """The files that hold the model's weights, in whichever form."""
    return [folder / name for name in weight_files(folder)] or sorted(path for path in folder.glob("*.bin") if path.is_file())


def read_index(path: Path, ending: str) -> tuple[dict[str, str], dict[str, Any]]:
    """(tensor -> name of its file, metadata) of a model's index. Raises ConfigError naming what is wrong with it, or a file that is not
    there."""
    remedy = "get the model again"
    try:
        index = read_json(path)
        weight_map = index["weight_map"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no index of weights ({type(error).__name__}: {error}); {remedy}") from error
    metadata = index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise ConfigError(f"{path} is no index of weights (weight_map and metadata are objects in one); {remedy}")
    for name in sorted({bare_name(file, path, ending) for file in weight_map.values()}):
        if not (path.parent / name).is_file():
            raise ConfigError(f"{path.parent / name} is missing, and {path.name} names it; {remedy}")
    return weight_map, metadata


def header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Tensor -> (shape, dtype) of a safetensors file, in the file's order. Raises ConfigError where it is none, or cut short."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    try:
        with safe_open(path, framework="pt") as handle:
            for name in handle.offset_keys():
                part = handle.get_slice(name)
                found[name] = tuple(part.get_shape()), part.get_dtype()
    except (OSError, SafetensorError, ValueError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"{path} cannot be read ({reason}); get the file again, or correct its permissions") from error
    return found


@contextlib.contextmanager
def explained(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever the libraries raise inside the block about files into a ConfigError: ``what`` (why); ``remedy``.

    They check little of what a model folder says, so a wrong value may surface as any exception. Errors of the machine, such as missing
    memory, and of other ranks pass.
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
