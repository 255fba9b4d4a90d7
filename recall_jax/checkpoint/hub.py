"""Models of the Hugging Face hub: from its local cache, else from the network."""

import os
import re
from pathlib import Path

from recall_jax.errors import InputError

# What a merge reads and copies. A repository may hold its weights a second time under other names.
_PATTERNS = [
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "model*.safetensors",
    "adapter_model.safetensors",
]
_TIMEOUT_S = 10.0
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_repository_id(spec: str) -> bool:
    """Whether `spec` reads as `organisation/name` and cannot be meant as a folder here."""
    return bool(_REPOSITORY.fullmatch(spec)) and not os.path.exists(spec.split("/")[0])


def snapshot(repository: str) -> Path:
    """The folder of a hub model, downloaded where it is not in the cache (unless HF_HUB_OFFLINE).

    InputError, whatever the reason, if it cannot be had.
    """
    return _cached(repository) or _downloaded(repository)


def _cached(repository: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(repository, allow_patterns=_PATTERNS, local_files_only=True)
        )
    except (OSError, ValueError):  # not there, or no name the hub could have
        return None
    # of some models the cache holds the tokenizer alone
    return folder if any(folder.glob("*.safetensors")) else None


def _downloaded(repository: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        # snapshot_download would wait without end for a hub that does not answer
        HfApi().model_info(repository, timeout=_TIMEOUT_S)
        return Path(snapshot_download(repository, allow_patterns=_PATTERNS))
    except Exception as error:  # the network, the login, the name: many kinds, one meaning
        raise InputError(
            f"no folder {repository!r} here, and the Hugging Face hub does not have it, does not "
            f"open it to you, or cannot be reached ({type(error).__name__})"
        ) from error
