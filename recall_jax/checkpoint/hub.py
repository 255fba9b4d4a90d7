"""Find models of the Hugging Face hub in its local cache, and download missing files."""

import glob
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from recall_jax.checkpoint.companions import (
    CONFIG_NAME,
    TOO_LARGE,
    modules_of,
    names_to_copy,
)
from recall_jax.checkpoint.folder_files import INDICES, WEIGHTS
from recall_jax.checkpoint.lora_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from recall_jax.errors import InputError
from recall_jax.files.json_objects import read_json_object

_ADAPTER = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
_TIMEOUT_S = 10.0
_REPOSITORY = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")


def is_repository_id(spec: str) -> bool:
    """Return whether `spec` has the form `organisation/name` or `organisation/name@revision`."""
    return _REPOSITORY.fullmatch(spec) is not None


def snapshot(spec: str) -> Path:
    """Return the folder of a hub model with all the files that a merge reads and copies.

    A commit in the cache is kept. Missing files are downloaded if the hub answers; no request is
    sent if HF_HUB_OFFLINE is set, or if an earlier listing shows that nothing is missing. If the
    hub does not answer, config and weights suffice. Raises InputError if even these are missing.
    """
    found = _REPOSITORY.fullmatch(spec)
    assert found is not None, "is_repository_id says so"
    repository, revision = found.groups()
    cached = _cached(repository, revision)
    if cached is not None and _is_complete(cached, _listed_before(repository, cached.name)):
        return cached
    try:
        return _completed(repository, revision, cached)
    except Exception as error:  # the network, the login, the name: many kinds, one meaning
        if cached is not None and _is_usable(cached):
            return cached
        raise InputError(
            f"no folder {spec!r} here, and the Hugging Face hub does not have it, denies "
            f"you access to it, or cannot be reached ({type(error).__name__})"
        ) from error


def _cached(repository: str, revision: str | None) -> Path | None:
    """Return the cached folder of a revision, whatever it contains, or None."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repository, revision=revision, local_files_only=True, allow_patterns=[]
        )
    except (OSError, ValueError):  # not cached, or not a valid name
        return None
    return Path(folder)


def _listed_before(repository: str, commit: str) -> dict[str, int] | None:
    """Return the sizes of a commit's files if an earlier run has listed them."""
    import huggingface_hub

    # Before version 2, listings were not cached.
    if not hasattr(huggingface_hub, "get_cached_repo_tree"):
        return None
    try:
        listed = huggingface_hub.get_cached_repo_tree(repository, revision=commit)
    except Exception:  # missing or unreadable: the hub lists them again
        return None
    return {file.path: file.size for file in listed}


def _completed(repository: str, revision: str | None, cached: Path | None) -> Path:
    """Download what the cached commit lacks, or the revision if the hub lacks that commit."""
    from huggingface_hub.errors import HfHubHTTPError

    if cached is None:
        return _downloaded(repository, revision)
    try:
        return _downloaded(repository, cached.name)
    except HfHubHTTPError:
        if _is_usable(cached):
            return cached
        return _downloaded(repository, revision)


def _downloaded(repository: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, RepoFile, snapshot_download
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()  # we report a failure in one line
    if not sys.stderr.isatty():
        disable_progress_bars()
    hub = HfApi()
    # the other requests would wait without end for a hub that does not answer
    commit = hub.model_info(repository, revision=revision, timeout=_TIMEOUT_S).sha
    entries = hub.list_repo_tree(repository, recursive=True, revision=commit)
    sizes = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
    folder = None
    for _ in range(2):  # the first round brings the files that list the others
        names = list(map(glob.escape, _needed(sizes, folder)))
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=names))
        if _is_complete(folder, sizes):
            break
    assert folder is not None
    return folder


def _needed(sizes: Mapping[str, int], folder: Path | None) -> list[str]:
    """Return the repository's files that a merge reads or copies, as far as `folder` shows."""
    modules = [] if folder is None else modules_of(folder)
    names = [name for name in names_to_copy(sizes, modules) if sizes[name] < TOO_LARGE]
    weights = [name for name in WEIGHTS if name in sizes][:1]
    shards = (
        [] if folder is None else [shard for name in weights for shard in _shards(folder / name)]
    )
    return [name for name in (*names, *weights, *shards, *_ADAPTER) if name in sizes]


def _is_complete(folder: Path, sizes: Mapping[str, int] | None) -> bool:
    return sizes is not None and all((folder / name).is_file() for name in _needed(sizes, folder))


def _is_usable(folder: Path) -> bool:
    """Return whether a folder holds a model or an adapter; some caches hold only a tokenizer."""
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is not None and (folder / CONFIG_NAME).is_file():
        return all((folder / shard).is_file() for shard in _shards(weights))
    return all((folder / name).is_file() for name in _ADAPTER)


def _shards(path: Path) -> Collection[str]:
    """Return the files that an index lists; empty for another file or an unreadable index."""
    if path.name not in INDICES or not path.is_file():
        return ()
    try:
        weight_map = read_json_object(path).get("weight_map")
    except InputError:  # opening the model will report the fault
        return ()
    return set(map(str, weight_map.values())) if isinstance(weight_map, dict) else ()
