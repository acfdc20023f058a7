"""An export's model card. This package writes it, and replaces it unless the user has edited it."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import create, replace

CARD = "README.md"
UNNAMED_BASE = (
    "The base model is a local folder. Before you publish this card, name the model here and, if it is on the hub, as `base_model` above."
)
"""Paragraph of a card that the user must replace before `export --push`."""
UNNAMED_REPO = "path/of/this/folder"
"""Name that a card's example loads the model from if no repository is known. `export --push` replaces it."""
_OF_MODELS = ("config.json", "adapter_config.json")
_SEAL = "<!-- cfvlm-ds wrote this card: "
"""Start of a card's last line, which contains a digest of the text above. A card that no longer matches its digest is the user's."""


def sealed(text: str) -> str:
    """Return a model card with a seal as its last line. The seal identifies cards that have not been edited."""
    return f"{text}{_SEAL}{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()} -->\n"


def is_own_card(path: Path) -> bool:
    """Return True if a file is a sealed card that has not been edited."""
    try:
        text = "" if path.is_symlink() else path.read_bytes().decode()
    except (OSError, ValueError):
        return False
    return sealed(text.rpartition(_SEAL)[0]) == text


def refuse_others_model(out_dir: Path, remedy: str = "name another folder with --out") -> None:
    """Raise ConfigError if ``out_dir`` contains a model that was not written by an export. A model counts as exported if it is in a run
    folder or its card has a seal.
    """
    if any((out_dir / name).is_file() for name in _OF_MODELS) and not (out_dir.parent / "config.yaml").is_file():
        try:
            ours = _SEAL in (out_dir / CARD).read_text()
        except (OSError, ValueError):
            ours = False
        if not ours:
            raise ConfigError(f"{out_dir} contains a model that no export wrote (see its {CARD}), which would be lost; {remedy}")


def write_card(folder: Path, card: str) -> bool:
    """Write a folder's card, unless the user has written or edited its README.md. Return True if the card was written."""
    path = folder / CARD
    if os.path.lexists(path) and not is_own_card(path):
        return False
    replace(path, card.encode())
    return True


def place_card(partial: Path, out_dir: Path, card: str | None) -> None:
    """Write ``card`` into the folder ``partial``, which will replace ``out_dir``. If the user has written a README.md in ``out_dir``, copy
    that file instead.
    """
    present = out_dir / CARD
    if os.path.lexists(present) and not is_own_card(present):
        shutil.copy2(present, partial / CARD, follow_symlinks=False)
    elif card is not None:
        with create(partial / CARD) as handle:
            handle.write(card.encode())
