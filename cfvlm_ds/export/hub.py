"""Upload of an export to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from cfvlm_ds.core.errors import ConfigError


def push(folder: Path, repo: str) -> str:
    """Upload an export to a model repository and return the repository's URL. A repository that does not exist is created as private.

    Raises ConfigError if the hub refuses the upload or cannot be reached. The export is not changed.
    """
    from huggingface_hub import HfApi

    try:
        address = HfApi().create_repo(repo, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Export of cfvlm-ds")
    except Exception as error:  # the network, the hub or the disk may fail
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{folder} cannot be pushed to {repo} ({type(error).__name__}: {reason}); check the network or HF_ENDPOINT, log in with "
            "`hf auth login`, and give a repository to which you can write, such as USER/NAME"
        ) from error
    return str(address)
