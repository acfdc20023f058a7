"""A folder that appears complete or not at all, in place of an older one of its kind."""

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
    """Raise ConfigError if ``out_dir`` holds one of ``needed``, or files that are not an older export (recognised by its file ``marker``),
    or if it is a link, whose target would be replaced."""
    refuse_link(out_dir, remedy)
    final = out_dir.resolve()
    for path in needed:
        if path.is_relative_to(final):
            raise ConfigError(f"{out_dir} holds {path}, which the export is made from; {remedy}")
    if final.exists() and not final.is_dir():
        raise ConfigError(f"{out_dir} is a file, and the export is a folder; {remedy}")
    if final.is_dir() and any(final.iterdir()) and not (final / marker).is_file():
        raise ConfigError(f"{out_dir} holds other files and no earlier export, and would be replaced; {remedy}")


CARD = "README.md"
_OF_MODELS = ("config.json", "adapter_config.json")
_SEAL = re.compile(r"<!-- cfvlm-ds wrote this card: ([0-9a-f]{32}) -->\n")
"""Ends a card. It holds a digest of what is above it: a card that somebody has edited is theirs from then on."""


def sealed(text: str) -> str:
    """A model card that is known again as one that nobody has changed."""
    return f"{text}<!-- cfvlm-ds wrote this card: {_digest(text)} -->\n"


def is_own_card(path: Path) -> bool:
    """Whether a file is a card that ``sealed`` has made, unchanged."""
    try:
        text = "" if path.is_symlink() else path.read_bytes().decode()
    except (OSError, ValueError):
        return False
    *_, last = ["", *_SEAL.finditer(text)]
    return isinstance(last, re.Match) and last.end() == len(text) and last[1] == _digest(text[: last.start()])


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def refuse_others_model(out_dir: Path, remedy: str = "name another folder with --out") -> None:
    """Raise ConfigError for a folder of a model that no export has written: neither is it in a run's folder, nor has its card ever been
    ours."""
    if any((out_dir / name).is_file() for name in _OF_MODELS) and not (out_dir.parent / "config.yaml").is_file():
        try:
            ours = _SEAL.search((out_dir / CARD).read_text()) is not None
        except (OSError, ValueError):
            ours = False
        if not ours:
            raise ConfigError(f"{out_dir} holds a model, and no export has written it (by its {CARD}), so that it would be lost; {remedy}")


def write_card(folder: Path, card: str) -> bool:
    """Put a card in place of an earlier one of ours. Whether that was done: another README.md is somebody's own, and stays."""
    path = folder / CARD
    if os.path.lexists(path) and not is_own_card(path):
        return False
    replace(path, card.encode())
    return True


def place_card(partial: Path, out_dir: Path, card: str | None) -> None:
    """The card of a folder that is to take the place of ``out_dir``: its README.md, where that is somebody's own, else ``card``."""
    there = out_dir / CARD
    if os.path.lexists(there) and not is_own_card(there):
        if there.is_dir() and not there.is_symlink():
            shutil.copytree(there, partial / CARD, symlinks=True)
        else:
            shutil.copy2(there, partial / CARD, follow_symlinks=False)
    elif card is not None:
        with create(partial / CARD) as handle:
            handle.write(card.encode())


@contextmanager
def replaced(out_dir: Path, marker: str, needed: Iterable[Path]) -> Iterator[Path]:
    """An empty folder to write to, which becomes ``out_dir`` at the end of the block; until then what was there stays.

    Raises ConfigError as ``refuse_replacing`` does, and StorageError for an OSError inside the block.
    """
    refuse_replacing(out_dir, marker, needed)
    final = out_dir.resolve()
    refuse_link(aside_of(final), "remove it")
    try:
        with whole_folder(final) as partial:
            yield partial
    except OSError as error:
        raise StorageError(f"{out_dir} cannot be written ({error}); what was there is unchanged; name another folder with --out") from error
