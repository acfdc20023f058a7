"""Model card of an export. An older card is replaced unless the user has edited it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import create, replace

CARD = "README.md"
UNNAMED_BASE = (
    "The base model is a local folder. Before you publish this card, name the model here and, if it is on the hub, as `base_model` above."
)
"""Paragraph of a card whose base model is a local folder. The user must replace it before `export --push`."""
UNNAMED_REPO = "path/of/this/folder"
"""Placeholder for the repository in a card's example if no repository is known. `export --push` replaces it."""
_OF_MODELS = ("config.json", "adapter_config.json")
_SEAL = "<!-- cfvlm-ds wrote this card: "
"""Start of a card's last line, the seal, which contains a digest of the text above it. If the digest does not match, the user has edited
the card."""

_STEPS = re.compile(r"after \d+ optimizer steps")


def sealed(text: str) -> str:
    """Append a seal to the text of a model card: a comment with the text's digest, which shows whether the card was edited later."""
    return f"{text}{_SEAL}{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()} -->\n"


def is_own_card(path: Path) -> bool:
    """Return whether a file is a sealed card that has not been edited."""
    try:
        text = "" if path.is_symlink() else path.read_bytes().decode()
    except (OSError, ValueError):
        return False
    return sealed(text.rpartition(_SEAL)[0]) == text


def refuse_others_model(out_dir: Path, remedy: str = "name another folder with --out") -> None:
    """Raise ConfigError if ``out_dir`` contains a model that was not written by an export. A model counts as exported if it is in a run
    folder or if its card has a seal.
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


def stale_card(folder: Path, card: str | None) -> str | None:
    """Return an error message if the user has edited a folder's card and it describes a different step than ``card``, otherwise None."""
    path = folder / CARD
    if not path.is_file() or is_own_card(path):
        return None
    kept, new = _STEPS.search(path.read_text(errors="replace")), _STEPS.search(card or "")
    if not kept or not new or kept[0] == new[0]:
        return None
    return (
        f"{path} has been edited and describes weights {kept[0]}, but these are weights {new[0]}; correct it, or move it away and export "
        "again to have a new one"
    )


def place_card(partial: Path, out_dir: Path, card: str | None) -> None:
    """Write ``card`` to the folder ``partial``, which will replace ``out_dir``. If the user has written or edited the README.md in
    ``out_dir``, copy that file instead.
    """
    present = out_dir / CARD
    if os.path.lexists(present) and not is_own_card(present):
        shutil.copy2(present, partial / CARD, follow_symlinks=False)
    elif card is not None:
        with create(partial / CARD) as handle:
            handle.write(card.encode())
