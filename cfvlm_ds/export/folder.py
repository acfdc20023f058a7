"""Replacement of an export's folder. The new folder is written under another name, and replaces an older export when it is complete."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cfvlm_ds.core.errors import ConfigError, StorageError
from cfvlm_ds.core.files import aside_of, create, replace, whole_folder
from cfvlm_ds.core.untrusted import refuse_link


def refuse_replacing(out_dir: Path, marker: str, needed: Iterable[Path], remedy: str = "name another folder with --out") -> None:
    """Raise ConfigError if ``out_dir`` must not be replaced.

    It must not be replaced if it contains one of ``needed``, if it contains files but no older export (which has the file ``marker``), if
    it is a file, or if it is a link, whose target would be replaced.
    """
    refuse_link(out_dir, remedy)
    final = out_dir.resolve()
    for path in needed:
        if path.is_relative_to(final):
            raise ConfigError(f"{out_dir} contains {path}, the source of the export; {remedy}")
    if final.exists() and not final.is_dir():
        raise ConfigError(f"{out_dir} is a file, not a folder; {remedy}")
    if final.is_dir() and any(final.iterdir()) and not (final / marker).is_file():
        raise ConfigError(f"{out_dir} contains files other than an export, which would be lost; {remedy}")


CARD = "README.md"
_OF_MODELS = ("config.json", "adapter_config.json")
_SEAL = re.compile(r"<!-- cfvlm-ds wrote this card: ([0-9a-f]{32}) -->\n")
"""Last line of a card, with a digest of the text above it. If the user edits a card, it no longer matches its digest and is kept."""


def sealed(text: str) -> str:
    """Append a seal to a model card. It identifies a card that the user has not changed."""
    return f"{text}<!-- cfvlm-ds wrote this card: {_digest(text)} -->\n"


def is_own_card(path: Path) -> bool:
    """Return True if a file is an unchanged card from ``sealed``."""
    try:
        text = "" if path.is_symlink() else path.read_bytes().decode()
    except (OSError, ValueError):
        return False
    *_, last = ["", *_SEAL.finditer(text)]
    return isinstance(last, re.Match) and last.end() == len(text) and last[1] == _digest(text[: last.start()])


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def refuse_others_model(out_dir: Path, remedy: str = "name another folder with --out") -> None:
    """Raise ConfigError if ``out_dir`` holds a model that no export wrote: it is not in a run folder, and its card has no seal."""
    if any((out_dir / name).is_file() for name in _OF_MODELS) and not (out_dir.parent / "config.yaml").is_file():
        try:
            ours = _SEAL.search((out_dir / CARD).read_text()) is not None
        except (OSError, ValueError):
            ours = False
        if not ours:
            raise ConfigError(f"{out_dir} contains a model that no export wrote (see its {CARD}), which would be lost; {remedy}")


def write_card(folder: Path, card: str) -> bool:
    """Write the card of a folder, unless its README.md is the user's. Returns True if the card was written."""
    path = folder / CARD
    if os.path.lexists(path) and not is_own_card(path):
        return False
    replace(path, card.encode())
    return True


def place_card(partial: Path, out_dir: Path, card: str | None) -> None:
    """Write the card of a folder that will replace ``out_dir``. A README.md that the user wrote in ``out_dir`` takes precedence over
    ``card``.
    """
    present = out_dir / CARD
    if os.path.lexists(present) and not is_own_card(present):
        if present.is_dir() and not present.is_symlink():
            shutil.copytree(present, partial / CARD, symlinks=True)
        else:
            shutil.copy2(present, partial / CARD, follow_symlinks=False)
    elif card is not None:
        with create(partial / CARD) as handle:
            handle.write(card.encode())


@contextmanager
def replaced(out_dir: Path, marker: str, needed: Iterable[Path]) -> Iterator[Path]:
    """Yield an empty folder that replaces ``out_dir`` at the end of the block.

    Raises the same errors as ``refuse_replacing``. An OSError within the block becomes a StorageError.
    """
    refuse_replacing(out_dir, marker, needed)
    final = out_dir.resolve()
    refuse_link(aside_of(final), "remove it")
    try:
        with whole_folder(final) as partial:
            yield partial
    except OSError as error:
        raise StorageError(
            f"{out_dir} cannot be written ({error}); its previous contents are unchanged; name another folder with --out"
        ) from error
