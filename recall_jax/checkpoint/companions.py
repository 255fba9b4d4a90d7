"""Copy the files that belong to a model but are not its weights: config, tokenizer, templates etc.

A family, or a library such as sentence-transformers, has additional files that no list of names
foresees. So all files are copied except those known to be useless or wrong in another folder.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from filecmp import cmp
from fnmatch import translate
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from recall_jax.errors import InputError, some, storage_faults
from recall_jax.files.json_objects import read_json_object, write_json_object

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
_MODULES = "modules.json"  # sentence-transformers lists the folder of each module in it
_TEMPLATES = "additional_chat_templates"
_SAFETENSORS = ".safetensors"
_MAX_DEPTH = 100  # folders within folders
TOO_LARGE = 64 << 20  # bytes: no tokenizer file is that large


def _names(*patterns: str) -> re.Pattern[str]:
    """Compile a pattern that matches a lower-case name against space-separated wildcards."""
    return re.compile("|".join(translate(each) for text in patterns for each in text.split()))


_WEIGHTS = (
    "*.safetensors *.bin *.gguf *.ggml *.onnx *.onnx_data *.h5 *.hdf5 *.keras *.msgpack *.ot *.npz "
    "*.npy *.tflite *.pb *.pte *.mlmodel *.nemo *.engine *.pt *.pth *.ckpt *.pkl *.pickle *.joblib"
)
# A folder with any of these is another model, an adapter or an Orbax checkpoint.
_MODEL_FILES = _names(_WEIGHTS, "adapter_config.json manifest.ocdbt _metadata")
_LEFT_OUT = _names(
    ".*",  # hidden
    _WEIGHTS,
    "*.index.json *.data-?????-of-?????",
    # from training
    "optimizer* scheduler* scaler* rng_state* global_step* latest zero_to_fp32.py training_args*",
    "trainer_state.json trainer_log.jsonl *_results.json *.log logs runs wandb *tfevents*",
    # about the original model
    "readme* model_card* modelcard*",
    # written by recall
    "recall_report.* recall_recipe.yml checksums.json part.json typical.jsonl training.json ewc",
    "tree __pycache__ *.pyc",
)
# A folder without one of these has no tokenizer.
_VOCABULARY = "tokenizer.json tekken.json vocab.* vocab-*.json *.model *.spm *.tiktoken bpe.codes"
_HAS_VOCABULARY = _names(_VOCABULARY)
_TOKENIZER = _names(
    _VOCABULARY,
    "tokenizer_config.json special_tokens_map.json added_tokens.json merges.txt chat_template.*",
    "tokenization_*.py",
)


@dataclass(frozen=True)
class Companions:
    """Hold the files to copy, by their names in the model folder, and warnings about them."""

    files: Mapping[str, Path]
    warnings: tuple[str, ...]


def copy_companions(
    source: Path,
    target: Path,
    *,
    config: Mapping[str, Any] | None = None,
    tokenizers: Sequence[Path] = (),
    older: Sequence[Path] = (),
    dtype: np.dtype[Any] | None = None,
) -> list[str]:
    """Copy the companion files of one model folder into another; return the warnings.

    `config` replaces the source's config, since an adapter may change it; `tokenizers` and `older`
    are as for `companions`. `dtype`, if given, is written into the copied config as the dtype of
    the weights. Raises InputError if the config is missing or malformed, or a file cannot be
    copied; StorageError if the disk fails.
    """
    original = read_json_object(source / CONFIG_NAME)
    written = dict(original if config is None else config)
    if dtype is not None:
        written.update(dict.fromkeys(_dtype_keys(written), dtype.name))
    found = companions(source, tokenizers, older)
    for name, path in found.files.items():
        with storage_faults(f"copy {path} to {target}"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
    if written != original or CONFIG_NAME not in found.files:
        with storage_faults(f"write {target / CONFIG_NAME}"):
            write_json_object(
                target / CONFIG_NAME, written, indent=2, ensure_ascii=False, allow_nan=True
            )
    return list(found.warnings)


def companions(
    source: Path, tokenizers: Sequence[Path] = (), older: Sequence[Path] = ()
) -> Companions:
    """Find the files that belong with the weights of the model in `source`.

    The tokenizer comes from the first folder that has one: of `tokenizers`, then `source`, then
    `older`, the folders of the models it is merged with. Links are left out, except links in the
    hub's cache to files in it. Raises InputError for a file that cannot be read.
    """
    preferred = (*tokenizers, source)
    giver = next(filter(has_tokenizer, (*preferred, *older)), source)
    if giver == source:
        found, warnings = _files_in(source)
    else:
        found, warnings = _files_in(source, lambda name: not is_tokenizer_file(name))
        theirs, others = _files_in(giver, is_tokenizer_file)
        found, warnings = found | theirs, warnings + others
    if giver not in preferred:
        warnings.append(f"{source} has no tokenizer: that of {giver} is taken")
    if unshared := _unshared_weights(source, found, older):
        warnings.append(f"weights of {source} that are not merged are copied: {some(unshared, 3)}")
    if code := [name for name in found if name.endswith(".py")]:
        warnings.append(
            f"code of {source} is copied, and was not run: {some(code, 3)}; read it before you "
            "load the model with trust_remote_code"
        )
    return Companions(found, tuple(warnings))


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer."""
    return bool(vocabulary_files(folder))


def vocabulary_files(folder: Path) -> list[str]:
    """Return the names of the files with a tokenizer's tokens; empty if the folder is missing."""
    with storage_faults(f"read {folder}"):
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [
        path.name for path in paths if _HAS_VOCABULARY.match(path.name.lower()) and path.is_file()
    ]


def is_tokenizer_file(name: str) -> bool:
    """Return whether a file, by its name in the model folder, belongs to a tokenizer."""
    if "/" in name:
        return name.startswith(f"{_TEMPLATES}/")
    return _TOKENIZER.match(name.lower()) is not None


def names_to_copy(names: Iterable[str], modules: Sequence[str]) -> list[str]:
    """Return the file names in a model folder that should be copied.

    `modules` are the folders of the modules of a sentence-transformers model.
    """
    paths = list(map(PurePosixPath, names))
    of_others = {  # folders of other models, adapters and checkpoints
        folder
        for path in paths
        if _MODEL_FILES.match(path.name.lower()) and not _is_of(path.as_posix(), modules)
        for folder in path.parents[:-1]
    }

    def goes(path: PurePosixPath) -> bool:
        of_module = _is_of(path.as_posix(), modules)
        if of_module and path.suffix == _SAFETENSORS:
            return True
        is_left_out = any(_LEFT_OUT.match(part.lower()) for part in path.parts)
        return not is_left_out and (of_module or of_others.isdisjoint(path.parents))

    return [path.as_posix() for path in paths if goes(path)]


def modules_of(folder: Path) -> list[str]:
    """Return the folders of the modules that make up a sentence-transformers model."""
    path = folder / _MODULES
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        return [str(entry["path"]) for entry in entries if entry["path"]]
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return []  # loading the model will report the fault


def _is_of(name: str, modules: Sequence[str]) -> bool:
    return any(name.startswith(f"{module}/") for module in modules)


def _files_in(
    folder: Path, wanted: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, Path], list[str]]:
    """Return the files of a folder to copy, sorted, and a warning for each kind left out."""
    root, modules = folder.resolve(), modules_of(folder)
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else None
    paths = {path.relative_to(folder).as_posix(): path for path in _paths_below(folder)}
    paths = {name: paths[name] for name in sorted(paths) if wanted(name)}
    links: list[str] = []
    large: list[str] = []
    found: dict[str, Path] = {}
    for name in names_to_copy(paths, modules):
        path = paths[name]
        if path.is_symlink() and Path(os.path.realpath(path)).parent != blobs:
            links.extend([name] if name != CONFIG_NAME else [])  # which is written separately
        elif path.is_file() and path.stat().st_size >= TOO_LARGE:
            large.append(name)
        elif path.is_file():
            found[name] = path
            if not os.access(path, os.R_OK):
                raise InputError(f"cannot read {path}: change its permissions, or move it away")
    pickled = [name for name in paths if _is_of(name, modules) and name.endswith(".bin")]
    warnings_by_kind = {
        f"links in {folder} are not copied": links,
        f"files of {folder} of {TOO_LARGE >> 20} MiB and more are not copied": large,
        f"pickled weights of modules of {folder} are not copied, save them as safetensors": pickled,
    }
    return found, [f"{what}: {some(names, 3)}" for what, names in warnings_by_kind.items() if names]


def _paths_below(folder: Path) -> Iterator[Path]:
    """Yield the files and links below a folder, without entering folders that are left out."""
    waiting = [folder] if folder.is_dir() else []
    while waiting:
        inside = waiting.pop()
        with storage_faults(f"read {inside}"):
            paths = list(inside.iterdir())
        for path in paths:
            if path.is_symlink() or not path.is_dir():
                yield path
            elif len(path.parts) > len(folder.parts) + _MAX_DEPTH:
                raise InputError(f"{folder} has folders {_MAX_DEPTH} deep: move them out of it")
            elif not _LEFT_OUT.match(path.name.lower()):
                waiting.append(path)


def _unshared_weights(source: Path, files: Mapping[str, Path], older: Sequence[Path]) -> list[str]:
    """Return the module weights, which no merge touches, that differ between the models."""

    def is_shared(name: str) -> bool:
        theirs = [folder / name for folder in older if (folder / _MODULES).is_file()]
        return all(path.is_file() and cmp(files[name], path, shallow=False) for path in theirs)

    return [name for name in files if name.endswith(_SAFETENSORS) and not is_shared(name)]


def _dtype_keys(config: dict[str, Any]) -> list[str]:
    """Return the config's keys for the dtype: transformers 5's, or the older one if present."""
    return [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
