"""Card of an export: written and replaced by this package as long as the user has not edited it."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import create, replace

CARD = "README.md"
_OF_MODELS = ("config.json", "adapter_config.json")
_SEAL = "<!-- cfvlm-ds wrote this card: "
"""Start of a card's last line, which has a digest of the text above it. A card that the user has edited no longer matches and is kept."""


def sealed(text: str) -> str:
    """Return a model card with a seal, the last line, by which an unchanged card is recognised."""
    return f"{text}{_SEAL}{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()} -->\n"


def is_own_card(path: Path) -> bool:
    """Return True if a file is an unchanged card from ``sealed``."""
    try:
        text = "" if path.is_symlink() else path.read_bytes().decode()
    except (OSError, ValueError):
        return False
    return sealed(text.rpartition(_SEAL)[0]) == text


def refuse_others_model(out_dir: Path, remedy: str = "name another folder with --out") -> None:
    """Raise ConfigError if ``out_dir`` holds a model that no export wrote: it is not in a run folder, and its card has no seal."""
    if any((out_dir / name).is_file() for name in _OF_MODELS) and not (out_dir.parent / "config.yaml").is_file():
        try:
            ours = _SEAL in (out_dir / CARD).read_text()
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
        shutil.copy2(present, partial / CARD, follow_symlinks=False)
    elif card is not None:
        with create(partial / CARD) as handle:
            handle.write(card.encode())
