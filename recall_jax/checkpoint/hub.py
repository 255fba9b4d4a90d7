"""Models of the Hugging Face hub: from its local cache, else from the network."""

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
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_repository_id(spec: str) -> bool:
    """Whether `spec` reads as `organisation/name` and cannot be meant as a folder here."""
    return bool(_REPOSITORY.fullmatch(spec)) and not Path(spec.split("/")[0]).exists()


def snapshot(repository: str) -> Path:
    """The folder of a hub model, downloaded where it is not in the cache (unless HF_HUB_OFFLINE).

    InputError, whatever the reason, if it cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        try:
            folder = Path(
                snapshot_download(repository, allow_patterns=_PATTERNS, local_files_only=True)
            )
            if any(folder.glob("*.safetensors")):  # the cache may hold a tokenizer alone
                return folder
        except Exception:
            pass
        return Path(snapshot_download(repository, allow_patterns=_PATTERNS))
    except Exception as error:
        raise InputError(
            f"no folder {repository!r} here, and the Hugging Face hub has no such model or cannot "
            f"be reached ({type(error).__name__})"
        ) from error
