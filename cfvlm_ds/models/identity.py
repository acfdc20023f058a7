"""Fingerprints of a model: hashes of its weights, and of the files that determine how images and texts are preprocessed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from cfvlm_ds.core.config import IMAGE_LIMITS, ModelConfig
from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import cache_folder, replace
from cfvlm_ds.core.progress import Alive, Progress, Say, no_op
from cfvlm_ds.core.run_folder import ADAPTER, ADAPTER_WEIGHTS
from cfvlm_ds.models.model_files import hashed_files, weight_patterns

_BLOCK = 1 << 22  # bytes read at a time
_INPUTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_NOT_INPUTS = ("*.index.json", "config.json", "generation_config.json", "adapter_config.json", "trainer_state.json")


def model_folder(name_or_path: str) -> Path:
    """Return the folder that contains a model's files. For a hub name, missing files are downloaded to the cache first. Raises ConfigError
    if the files cannot be read.
    """
    if os.path.isdir(name_or_path):
        return Path(name_or_path).resolve()
    from huggingface_hub import HfApi, snapshot_download

    files: list[str] = []
    with contextlib.suppress(Exception):  # offline, the cached snapshot is used
        files = HfApi().list_repo_files(name_or_path)
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=["README.md", *_INPUTS, *weight_patterns(files)]))
    except OSError as error:
        raise ConfigError(
            f"the files of {name_or_path} cannot be read ({' '.join(str(error).split())}); give the model's folder instead"
        ) from error


def fingerprint(config: ModelConfig, alive: Alive = no_op, say: Say = no_op) -> dict[str, str]:
    """Return a model's fingerprint: {"weights": sha256, "inputs": sha256}.

    "weights" covers the configuration and every byte of the weight files. Unchanged files are not read again. "inputs" is the result of
    ``inputs_fingerprint``. While files are being read, ``alive`` is called regularly and ``say`` receives progress lines.
    """
    folder = model_folder(config.name_or_path)
    weights = hashlib.sha256((folder / "config.json").read_bytes())
    files = hashed_files(folder)
    progress = Progress(say, f"sha256 of the weights of {config.name_or_path}", sum(path.stat().st_size for path in files) / 1e6, "MB")

    def read(size: int) -> None:
        alive()
        progress.advance(size / 1e6)

    for path in files:
        weights.update(f"{path.name} {file_digest(path, read)}".encode())
    return {"weights": weights.hexdigest(), "inputs": inputs_fingerprint(config)}


def adapter_fingerprint(folder: Path, alive: Alive = no_op) -> str:
    """Return the sha256 of adapters in peft's format: their configuration and weights."""
    digests = "".join(file_digest(folder / name, lambda size: alive()) for name in (ADAPTER, ADAPTER_WEIGHTS))
    return hashlib.sha256(digests.encode()).hexdigest()


def inputs_fingerprint(config: ModelConfig) -> str:
    """Return the sha256 of the tokenizer, the processor, the chat template, and the limits on visual tokens."""
    folder = model_folder(config.name_or_path)
    inputs = hashlib.sha256(json.dumps([getattr(config, option) for option in IMAGE_LIMITS]).encode())
    for path in sorted(path for pattern in _INPUTS for path in folder.glob(pattern)):
        if not any(path.match(pattern) for pattern in _NOT_INPUTS):
            inputs.update(path.name.encode() + path.read_bytes())
    return inputs.hexdigest()


def file_digest(path: Path, read: Callable[[int], object]) -> str:
    """Return the sha256 of a file. Digests are cached in the user's cache folder, and writing to the file invalidates its entry.

    ``read`` is called with the size in bytes of each block as it is read.
    """
    stat = path.stat()
    state = f"{stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    remembered = cache_folder() / "weights" / hashlib.sha256(f"{path.resolve()} {state}".encode()).hexdigest()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if re.fullmatch(r"[0-9a-f]{64}", cached := remembered.read_text()):
            return cached
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
            read(len(block))
    with contextlib.suppress(OSError):  # without a writable cache, the file is hashed again next time
        remembered.parent.mkdir(parents=True, exist_ok=True)
        replace(remembered, digest.hexdigest().encode(), shared=True)
    return digest.hexdigest()
