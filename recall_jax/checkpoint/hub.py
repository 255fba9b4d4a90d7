"""Models of the Hugging Face hub: from its local cache, and what that lacks from the network."""

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
    """Whether `spec` reads as `organisation/name` or `organisation/name@revision`."""
    return _REPOSITORY.fullmatch(spec) is not None


def snapshot(spec: str) -> Path:
    """The folder of a hub model, with all that a merge reads and copies of it.

    The commit that the cache has is kept. Files that it lacks are downloaded where the hub answers
    (which is not asked if HF_HUB_OFFLINE is set, or if what it said before tells that none is
    missing); where it does not, config and weights will do. InputError, whatever the reason, if
    not even those can be had.
    """
    found = _REPOSITORY.fullmatch(spec)
    assert found is not None, "is_repository_id says so"
    repository, revision = found.groups()
    cached = _cached(repository, revision)
    if cached is not None and _is_whole(cached, _listed_before(repository, cached.name)):
        return cached
    try:
        return _completed(repository, revision, cached)
    except Exception as error:  # the network, the login, the name: many kinds, one meaning
        if cached is not None and _is_usable(cached):
            return cached
        raise InputError(
            f"no folder {spec!r} here, and the Hugging Face hub does not have it, does not "
            f"open it to you, or cannot be reached ({type(error).__name__})"
        ) from error


def _cached(repository: str, revision: str | None) -> Path | None:
    """The folder of a revision in the cache, whatever it holds."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repository, revision=revision, local_files_only=True, allow_patterns=[]
        )
    except (OSError, ValueError):  # not there, or no name the hub could have
        return None
    return Path(folder)


def _listed_before(repository: str, commit: str) -> dict[str, int] | None:
    """The sizes of a commit's files, where the hub has been asked for them before."""
    import huggingface_hub

    if not hasattr(huggingface_hub, "get_cached_repo_tree"):  # before version 2 nobody kept it
        return None
    try:
        listed = huggingface_hub.get_cached_repo_tree(repository, revision=commit)
    except Exception:  # none, or none that can be read: the hub is asked again
        return None
    return {file.path: file.size for file in listed}


def _completed(repository: str, revision: str | None, cached: Path | None) -> Path:
    """The commit that the cache has, if the hub still knows it, else the revision, downloaded."""
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

    logging.set_verbosity_error()  # what goes wrong in the end is told in a line of ours
    if not sys.stderr.isatty():
        disable_progress_bars()
    hub = HfApi()
    # the other requests would wait without end for a hub that does not answer
    commit = hub.model_info(repository, revision=revision, timeout=_TIMEOUT_S).sha
    entries = hub.list_repo_tree(repository, recursive=True, revision=commit)
    sizes = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
    folder = None
    for _ in range(2):  # the first time brings what names the others
        names = list(map(glob.escape, _needed(sizes, folder)))
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=names))
        if _is_whole(folder, sizes):
            break
    assert folder is not None
    return folder


def _needed(sizes: Mapping[str, int], folder: Path | None) -> list[str]:
    """Which of a repository's files a merge reads or copies, as far as those in `folder` tell."""
    modules = [] if folder is None else modules_of(folder)
    names = [name for name in names_to_copy(sizes, modules) if sizes[name] < TOO_LARGE]
    weights = [name for name in WEIGHTS if name in sizes][:1]
    shards = (
        [] if folder is None else [shard for name in weights for shard in _shards(folder / name)]
    )
    return [name for name in (*names, *weights, *shards, *_ADAPTER) if name in sizes]


def _is_whole(folder: Path, sizes: Mapping[str, int] | None) -> bool:
    return sizes is not None and all((folder / name).is_file() for name in _needed(sizes, folder))


def _is_usable(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter: of some the cache has the tokenizer alone."""
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is not None and (folder / CONFIG_NAME).is_file():
        return all((folder / shard).is_file() for shard in _shards(weights))
    return all((folder / name).is_file() for name in _ADAPTER)


def _shards(path: Path) -> Collection[str]:
    """The files that an index names; none of another file, or an index that cannot be read."""
    if path.name not in INDICES or not path.is_file():
        return ()
    try:
        weight_map = read_json_object(path).get("weight_map")
    except InputError:  # whoever opens the model will say what is wrong with it
        return ()
    return set(map(str, weight_map.values())) if isinstance(weight_map, dict) else ()
