"""Open a model as the user names it: a folder, a hub model, either with LoRA adapters folded in."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recall_jax.checkpoint.companions import CONFIG_NAME
from recall_jax.checkpoint.hub import is_repository_id, snapshot
from recall_jax.checkpoint.identity import FileIdentity
from recall_jax.checkpoint.json_objects import read_json_object
from recall_jax.checkpoint.lora import BoundAdapter, folded_dtype, read_adapter
from recall_jax.checkpoint.parameter_names import is_buffer
from recall_jax.checkpoint.pytorch_bin import PytorchFile
from recall_jax.checkpoint.quantised import quantised_by, quantised_tensor
from recall_jax.checkpoint.safetensors import SafetensorsFile
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.errors import InputError, storage_faults

# In the order in which transformers looks for them: the first that exists is read.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_INDICES = tuple(name for name in WEIGHTS if name.endswith(".index.json"))


class Checkpoint:
    """A model on disk: its config, and its parameters one at a time.

    Buffers that carry no parameter are as if they were not there; `warnings` are lines on what else
    of the files is not read. `specs` are of the tensors as they are read, which an adapter makes
    float32 where it changes them; `stored` of the same tensors in the dtypes of the base, in which
    a model is written where no other is asked for. `quantised` is what tells that its weights are,
    None for all models but those that are opened to be looked at alone.
    """

    def __init__(
        self, name: str, folder: Path, adapters: tuple[Path, ...] = (), *, look: bool = False
    ) -> None:
        """Read the config and every header; the weights stay on disk.

        InputError if anything is missing, malformed or unsafe, or the weights are quantised, unless
        it is only to `look` at them.
        """
        self.name = name
        self.folder = folder
        self.adapters = adapters
        self.config = _read_config(folder)
        self.quantised: str | None = None
        may_be = look and not adapters
        if method := quantised_by(self.config):
            self._note_quantised(f"quantization_config in its config.json: {method}", may_be)
        self._file_of, self.warnings = _weight_files(folder)
        self._in_files: dict[str, str] = {}  # names of those tensors that are called otherwise
        self.stored: Mapping[str, TensorSpec] = {
            tensor: file.specs[tensor]
            for tensor, file in self._file_of.items()
            if not is_buffer(tensor, file.specs[tensor])
        }
        if not self.stored:
            raise InputError(f"{folder}: its weights hold no parameters")
        _refuse_empty(self.stored, name)
        if self.quantised is None and (tensor := quantised_tensor(self.stored)):
            self._note_quantised(f"tensor {tensor}", may_be)
        self._bytes_read = 0
        self._files = list(dict.fromkeys(self._file_of.values()))
        self._bound: list[BoundAdapter] = []
        self._folded: tuple[str, np.ndarray] | None = None  # the last one cut in rows
        for adapter in adapters:
            self._bound.append(read_adapter(adapter).bind(self.stored, self.config))
            self.stored, self.config = self._bound[-1].specs, self._bound[-1].config
            self._files.append(self._bound[-1].file)
        self.specs: Mapping[str, TensorSpec] = {
            tensor: TensorSpec(folded_dtype(spec.dtype), spec.shape)
            if self._is_folded(tensor)
            else spec
            for tensor, spec in self.stored.items()
        }

    def _note_quantised(self, told: str, may_be: bool) -> None:
        self.quantised = told
        if not may_be:
            raise InputError(
                f"{self.name} is quantised ({told}): such numbers can be neither merged nor run "
                "here; take the model in bfloat16, float16 or float32 that it was made from, or "
                "remove the quantization_config where the weights are floats after all"
            )

    @property
    def tokenizer_folders(self) -> tuple[Path, ...]:
        """Where to look for the tokenizer: an adapter may bring its own."""
        return (*reversed(self.adapters), self.folder)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored, adapters folded in."""
        return sum(spec.nbytes for spec in self.stored.values())

    @property
    def bytes_read(self) -> int:
        """Bytes of the weight byte ranges asked for so far, those of adapters included."""
        return self._bytes_read + sum(bound.bytes_read for bound in self._bound)

    def rename(self, names: Mapping[str, str]) -> None:
        """Call tensors by other names hereafter: by those that `names` has for the present ones."""
        self._in_files |= {new: self._in_files.get(old, old) for old, new in names.items()}
        self.stored = {names.get(name, name): spec for name, spec in self.stored.items()}
        self.specs = {names.get(name, name): spec for name, spec in self.specs.items()}

    def read(self, name: str) -> np.ndarray:
        """Tensor `name`, C-contiguous, dtype and shape as in `specs`; KeyError if unknown.

        A read-only view of the file where no adapter touches the tensor.
        """
        array, name = None, self._in_files.get(name, name)
        if file := self._file_of.get(name):
            array = file.read(name)
            self._bytes_read += array.nbytes
        for bound in self._bound:
            if bound.touches(name):
                array = bound.fold(name, array)
        if array is None:
            raise KeyError(name)
        return array

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of what `read` gives; a scalar is one row, (1,).

        Only these are read of a tensor that no adapter touches. Another is folded whole, and kept
        until the next one is, so that several cuts of it read and fold it once.
        """
        name = self._in_files.get(name, name)
        if self._is_folded(name):
            if self._folded is None or self._folded[0] != name:
                self._folded = name, self.read(name)
            array = self._folded[1]
            return array.reshape(array.shape or (1,))[start:stop]
        rows = self._file_of[name].read_rows(name, start, stop)
        self._bytes_read += rows.nbytes
        return rows

    def _is_folded(self, name: str) -> bool:
        return any(bound.touches(name) for bound in self._bound)

    def drop(self, name: str) -> None:
        """Tell the system that it need not keep the bytes of tensor `name` in its cache.

        Those of adapters, small and read for many tensors, stay.
        """
        name = self._in_files.get(name, name)
        if file := self._file_of.get(name):
            file.drop(name)

    def changed(self) -> Path | None:
        """The first weight file, of the model or an adapter, that is not what it was when opened.

        None if all are. Compares size, time and inode; reads nothing.
        """
        return next((file.path for file in self._files if not _is_as_opened(file)), None)

    def fingerprint(self) -> dict[str, list[Any]]:
        """What tells this model from another: [size, mtime_ns, sha256] by the path of each file.

        The hash is of a weight file's header (None for a .bin, which has none), and of the whole of
        a config or index. No tensor is read. Plain values, equal after a passage through JSON.
        """
        found: dict[str, list[Any]] = {}
        for file in self._files:
            found[_key(file.path)] = [file.identity.size, file.identity.mtime_ns, file.header_hash]
        names = (CONFIG_NAME, "adapter_config.json", *_INDICES)
        for path in (folder / name for folder in (self.folder, *self.adapters) for name in names):
            if os.path.isfile(path):
                found[_key(path)] = _hashed(path)
        return found


def open_checkpoint(spec: str | Path, *, look: bool = False) -> Checkpoint:
    """Open `folder`, `folder+adapter[+adapter…]`, or a hub id `org/name` in place of either.

    A folder that exists by the whole name is meant as it stands, '+' and all. InputError if
    anything is missing, malformed or unsafe, or quantised, unless it is only to `look` at.
    """
    base, *adapters = (_locate(part) for part in _split(str(spec)))
    return Checkpoint(str(spec), base, tuple(adapters), look=look)


def file_warnings(models: Iterable[Checkpoint]) -> list[str]:
    """The warnings of all models' files, each once."""
    return list(dict.fromkeys(line for model in models for line in model.warnings))


def older_folders(models: Sequence[Checkpoint]) -> list[Path]:
    """The folders of all models but the last, those of the one before it first."""
    return [folder for model in reversed(models[:-1]) for folder in model.tokenizer_folders]


def _split(spec: str) -> list[str]:
    """Base and adapters; the longest beginning that is a folder is the base."""
    parts = spec.split("+")
    beginnings = ((end, "+".join(parts[:end])) for end in range(len(parts), 1, -1))
    end, base = next((found for found in beginnings if os.path.isdir(found[1])), (1, parts[0]))
    return [base, *(_split("+".join(parts[end:])) if parts[end:] else [])]


def _locate(part: str) -> Path:
    if not part:
        raise InputError("a model or adapter without a name: write base or base+adapter")
    if os.path.isdir(part):
        return Path(part)
    if os.path.exists(part):
        _refuse_gguf(Path(part))
        raise InputError(f"{part} is a file: name the folder it is in")
    if is_repository_id(part):
        return snapshot(part)
    raise InputError(f"no model folder {part!r}: give a folder, folder+adapter, or hub id org/name")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not os.path.isfile(path):
        if os.path.isfile(folder / "adapter_config.json"):
            raise InputError(f"{folder} is an adapter: write BASE+{folder} to fold it in")
        _refuse_gguf(folder)
        raise InputError(f"{folder} has no {CONFIG_NAME}: it is not a model folder")
    config = read_json_object(path)
    if config.get("transformers_weights"):
        raise InputError(
            f"{path}: transformers_weights is not supported; rename the file to {WEIGHTS[0]} and "
            "remove the key"
        )
    return config


def _weight_files(folder: Path) -> tuple[dict[str, SafetensorsFile | PytorchFile], list[str]]:
    """The file of each tensor, and warnings."""
    for name in WEIGHTS:
        path = folder / name
        if os.path.isfile(path):
            if name in _INDICES:
                return _indexed_files(path)
            file = _open(path)
            return dict.fromkeys(file.specs, file), []
    _refuse_gguf(folder)
    raise InputError(f"{folder} has no weights: none of {', '.join(WEIGHTS)}")


def _refuse_gguf(path: Path) -> None:
    """Raise InputError for a file of GGUF, or a folder that holds one."""
    if found := sorted(file for file in (path, *path.glob("*")) if file.suffix == ".gguf"):
        raise InputError(
            f"{found[0]}: GGUF is not read yet; take the model in safetensors, or load this with "
            "transformers (gguf_file=...), dequantised, and save it"
        )


def _refuse_empty(specs: Mapping[str, TensorSpec], model: str) -> None:
    for name, spec in specs.items():
        if 0 in spec.shape:
            raise InputError(
                f"{model}: tensor {name} has shape {list(spec.shape)} and holds nothing, as what "
                "DeepSpeed ZeRO-3 leaves: gather the weights with its zero_to_fp32.py first"
            )


def _indexed_files(index: Path) -> tuple[dict[str, SafetensorsFile | PytorchFile], list[str]]:
    """The shard of each tensor that an index names, and a warning of each that has others too."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or shard != os.path.basename(shard):
            raise InputError(
                f"{index}: tensor {tensor!r} is in {shard!r}, which is no file beside it"
            )
    file_of: dict[str, SafetensorsFile | PytorchFile] = {}
    warnings = []
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        if not os.path.isfile(path):
            raise InputError(f"{index} names {shard!r}, which is missing")
        file = _open(path)
        expected = {tensor for tensor, its_shard in weight_map.items() if its_shard == shard}
        if missing := sorted(expected - file.specs.keys()):
            raise InputError(
                f"{path} lacks the tensor {missing[0]!r} that {index.name} says it has"
            )
        file_of |= {tensor: file for tensor in file.specs if tensor in expected}
        if extra := sorted(file.specs.keys() - expected):
            why = "is in another shard" if extra[0] in weight_map else "it does not name"
            warnings.append(
                f"{path}: left out {len(extra)} tensors that by {index.name} are not in this file, "
                f"such as {extra[0]}, which {why}"
            )
    return file_of, warnings


def _open(path: Path) -> SafetensorsFile | PytorchFile:
    return PytorchFile(path) if path.suffix == ".bin" else SafetensorsFile(path)


def _is_as_opened(file: SafetensorsFile | PytorchFile) -> bool:
    try:
        return FileIdentity.of(file.path) == file.identity
    except OSError:  # it is gone
        return False


def _hashed(path: Path) -> list[Any]:
    """Size, mtime_ns and the sha256 of the content of a small file."""
    with storage_faults(f"read {path}"):
        identity = FileIdentity.of(path)
        return [identity.size, identity.mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()]


def _key(path: Path) -> str:
    return os.path.realpath(path)
