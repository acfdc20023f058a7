"""Upload of an export to the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cfvlm_ds.core.errors import ConfigError
from cfvlm_ds.core.files import replace
from cfvlm_ds.core.progress import Say
from cfvlm_ds.core.secrets import without_secrets
from cfvlm_ds.export.folder import CARD, UNNAMED_BASE

_NAME = re.compile(rb'^name = ".*"$', re.MULTILINE)
"""Line of the card's example that names the model to load."""


def push(folder: Path, repo: str, say: Say) -> str:
    """Upload an export to a model repository and return the repository's URL. A repository that does not exist is created as private.

    If HF_ENDPOINT names a server other than the hub, files are uploaded through Git LFS unless HF_HUB_DISABLE_XET is set: other servers
    often lack the Xet protocol, and the client would wait minutes for it. The export is not changed, except that the example in its card
    loads ``repo`` after a successful upload. Raises ConfigError if the card does not name the base model, or if the hub refuses the upload
    or cannot be reached.
    """
    from huggingface_hub import HfApi, constants

    card = folder / CARD
    text = card.read_bytes() if card.is_file() else b""
    if UNNAMED_BASE.encode() in text:
        raise ConfigError(
            f"{card} does not name the base model, which is a local folder; replace the paragraph 'The base model is a local folder...', "
            "add `base_model: ORG/NAME` between the --- lines if the base model is on the hub, and push again; your changes are kept"
        )
    if constants.ENDPOINT != constants._HF_DEFAULT_ENDPOINT and "HF_HUB_DISABLE_XET" not in os.environ:
        constants.HF_HUB_DISABLE_XET = True  # a single call has no such option
    if (named := _NAME.sub(lambda _: f'name = "{repo}"'.encode(), text, count=1)) != text:
        replace(card, named)
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    say(f"pushing {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB, to {without_secrets(constants.ENDPOINT)}/{repo}")
    try:
        address = HfApi().create_repo(repo, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Export of cfvlm-ds")
    except Exception as error:  # the network, the hub or the disk may fail
        if named != text:
            replace(card, text)
        reason = " ".join(str(error).split())[:300]
        xet = "" if constants.HF_HUB_DISABLE_XET else ", set HF_HUB_DISABLE_XET=1 if the server lacks Xet"
        raise ConfigError(
            f"{folder} cannot be pushed to {repo} ({type(error).__name__}: {reason}); check the network or HF_ENDPOINT{xet}, log in with "
            "`hf auth login` or HF_TOKEN, and give a repository to which you can write, such as USER/NAME"
        ) from error
    return str(address)
