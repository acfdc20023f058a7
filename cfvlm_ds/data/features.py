"""Feature cache: a frozen vision tower's outputs in one safetensors file per picture. The file's name is a hash of everything that
determines the outputs.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cfvlm_ds.core.errors import DataError
from cfvlm_ds.core.files import replace

_TOWER, _INPUT = "tower.", "input."


@dataclass(frozen=True)
class Features:
    """Outputs of the vision tower for a picture, and everything else that a batch needs in place of the picture.

    ``size`` is the picture's width and height in pixels. ``placeholder_ids`` are the token ids that represent it in a prompt. ``tower``
    maps the name of each projector module to the module's inputs. ``inputs`` maps the name of each other model input to the part of it that
    belongs to the picture.
    """

    size: tuple[int, int]
    placeholder_ids: list[int]
    tower: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]


@dataclass
class FeatureCache:
    """Disk cache of the vision tower's outputs for a run's pictures.

    Args:
        folder: folder for the files; several runs can share it at the same time.
        origin: everything besides the picture that determines its features (weights, processor, dtype, versions); each origin has its own
            subfolder.
        known: digest of each picture, or an error message if it cannot be read.
    """

    folder: Path
    origin: Mapping[str, str]
    known: dict[Any, bytes | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place = self.folder / hashlib.sha256(json.dumps(dict(self.origin), sort_keys=True).encode()).hexdigest()[:16]

    def file(self, digest: bytes) -> Path:
        """Return the path of the features file for a picture with this digest."""
        name = digest.hex()
        return self.place / name[:2] / f"{name}.safetensors"

    def of(self, picture: Any) -> Features:
        """Read the features of a picture. Raises a DataError that names the unreadable picture or feature file."""
        digest = self.known[picture]
        if isinstance(digest, str):
            raise DataError(digest)
        return read_features(self.file(digest))


def picture_digest(content: bytes, together: bool) -> bytes:
    """Hash a picture file's contents and the flag ``together``, which states whether the model processes a prompt's pictures jointly."""
    return hashlib.sha256(bytes([together]) + content).digest()


def write_features(file: Path, features: Features) -> None:
    """Write a picture's features to a temporary file and rename it, so several processes can share the cache. Raises OSError."""
    tensors = {f"{_TOWER}{name}": tensor.contiguous() for name, tensor in features.tower.items()}
    tensors |= {f"{_INPUT}{name}": tensor.contiguous() for name, tensor in features.inputs.items()}
    tensors |= {"size": torch.tensor(features.size), "placeholder_ids": torch.tensor(features.placeholder_ids)}
    file.parent.mkdir(parents=True, exist_ok=True)
    replace(file, save(tensors, {"sum": _sum(tensors)}), shared=True)


def read_features(file: Path) -> Features:
    """Read a features file. Raises a DataError that names the file if it is missing or damaged."""
    try:
        with safe_open(file, "pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in sorted(handle.keys())}
            if handle.metadata()["sum"] != _sum(tensors):
                raise ValueError("its checksum differs")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: features cannot be read ({error}); remove the file and start the run again, with a folder that all ranks can read"
        ) from error
    width, height = tensors.pop("size").tolist()
    return Features((width, height), tensors.pop("placeholder_ids").tolist(), dict(_named(tensors, _TOWER)), dict(_named(tensors, _INPUT)))


def _named(tensors: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    return ((name.removeprefix(prefix), tensor) for name, tensor in tensors.items() if name.startswith(prefix))


def _sum(tensors: Mapping[str, Tensor]) -> str:
    total = 0
    for name in sorted(tensors):
        data: Any = tensors[name].reshape(-1).view(torch.uint8).numpy()
        total = zlib.crc32(data, zlib.crc32(name.encode(), total))
    return str(total)
