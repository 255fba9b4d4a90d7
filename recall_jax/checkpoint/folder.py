"""Open a model as the user names it: a folder, a hub model, either with LoRA adapters folded in."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recall_jax.checkpoint.companions import CONFIG_NAME
from recall_jax.checkpoint.folder_files import (
    INDICES,
    WeightFile,
    read_config,
    refuse_empty,
    weight_files,
)
from recall_jax.checkpoint.lora import read_adapter
from recall_jax.checkpoint.lora_bound import BoundAdapter, folded_dtype
from recall_jax.checkpoint.lora_config import ADAPTER_CONFIG
from recall_jax.checkpoint.model_names import find_parts
from recall_jax.checkpoint.parameter_names import is_buffer, with_prefix
from recall_jax.checkpoint.quantised import quantised_by, quantised_tensor
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.ties import is_tied, shared_embedding, stored_twice, untied, with_a_head
from recall_jax.errors import InputError, storage_faults
from recall_jax.files.checksums import file_checksum
from recall_jax.files.identity import FileIdentity

_COMPARED = 1 << 22  # bytes of two tensors held against each other at a time


class Checkpoint:
    """A model on disk: its config, and its parameters one at a time.

    `full_name` is one by which it is found from anywhere: absolute paths, and hub ids. Buffers that
    carry no parameter are as if they were not there. `specs` are of the tensors as
    they are read, which an adapter makes float32 where it changes them; `stored` of the same in the
    dtypes of the base, in which a model is written where no other is asked for. `config` is
    config.json with what adapters change, and without a tie of head and embedding that the weights
    deny: that is a line of `faults`. `notes` are lines on what else of the files is not read.
    `quantised` is what tells that its weights are, None for all models but those that are opened to
    be looked at alone.
    """

    def __init__(
        self, name: str, folder: Path, adapters: tuple[Path, ...] = (), *, look: bool = False
    ) -> None:
        """Read the config and every header; the weights stay on disk.

        InputError if anything is missing, malformed or unsafe, or the weights are quantised, unless
        it is only to `look` at them.
        """
        self.name = name
        self.full_name = "+".join(str(path.resolve()) for path in (folder, *adapters))
        self.folder = folder
        self.adapters = adapters
        self.config = read_config(folder)
        self.faults: list[str] = []
        self.quantised: str | None = None
        may_be = look and not adapters
        if method := quantised_by(self.config):
            self._note_quantised(f"quantization_config in its config.json: {method}", may_be)
        self._file_of, self.notes = weight_files(folder)
        self._in_files: dict[str, str] = {}  # names of those tensors that are called otherwise
        self.stored: Mapping[str, TensorSpec] = {
            tensor: file.specs[tensor]
            for tensor, file in self._file_of.items()
            if not is_buffer(tensor, file.specs[tensor])
        }
        if not self.stored:
            raise InputError(f"{folder}: its weights hold no parameters")
        refuse_empty(self.stored, name)
        if self.quantised is None and (tensor := quantised_tensor(self.stored)):
            self._note_quantised(f"tensor {tensor}", may_be)
        self._bytes_read = 0
        self._files = list(dict.fromkeys(self._file_of.values()))
        self._bound: list[BoundAdapter] = []
        self._origins: Mapping[str, str] = {}
        self._folded: tuple[str, np.ndarray] | None = None  # the last one cut in rows
        self._settle_tie()
        self._leave_out_copies()
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
        self.rename(with_prefix(self.stored))

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

    @property
    def warnings(self) -> list[str]:
        """What whoever uses the model should know of it: its faults and notes."""
        return [*self.faults, *self.notes]

    def rename(self, names: Mapping[str, str]) -> None:
        """Call tensors by other names hereafter: by those that `names` has for the present ones."""
        self._in_files |= {new: self._in_files.get(old, old) for old, new in names.items()}
        self.stored = {names.get(name, name): spec for name, spec in self.stored.items()}
        self.specs = {names.get(name, name): spec for name, spec in self.specs.items()}

    def read(self, name: str) -> np.ndarray:
        """Tensor `name`, C-contiguous, dtype and shape as in `specs`; KeyError if unknown.

        A read-only view of the file where no adapter touches the tensor.
        """
        return self._read(self._stored_as(name), len(self._bound))

    def _stored_as(self, name: str) -> str:
        """What the tensor that is called `name` now is called in the files."""
        name = self._in_files.get(name, name)
        name = self._origins.get(name, name)
        return self._in_files.get(name, name)

    def _read(self, name: str, adapters: int) -> np.ndarray:
        """Tensor `name` with the first so many adapters folded in."""
        while adapters and not self._bound[adapters - 1].touches(name):
            adapters -= 1
        if not adapters:
            array = self._file_of[name].read(name)
            self._bytes_read += array.nbytes
            return array
        bound = self._bound[adapters - 1]
        source = bound.source(name)
        return bound.fold(name, None if source is None else self._read(source, adapters - 1))

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of what `read` gives; a scalar is one row, (1,).

        Only these are read of a tensor that no adapter touches. Another is folded whole, and kept
        until the next one is, so that several cuts of it read and fold it once.
        """
        name = self._stored_as(name)
        if self._is_folded(name):
            if self._folded is None or self._folded[0] != name:
                self._folded = name, self._read(name, len(self._bound))
            array = self._folded[1]
            return array.reshape(array.shape or (1,))[start:stop]
        rows = self._file_of[name].read_rows(name, start, stop)
        self._bytes_read += rows.nbytes
        return rows

    def _is_folded(self, name: str) -> bool:
        return any(bound.touches(name) for bound in self._bound)

    def untie(self) -> None:
        """From now on, have an output head that is the embedding as a tensor of its own.

        InputError if the model has a head already, or it is not clear what its embedding is.
        """
        if not is_tied(self.stored, self.config):
            raise InputError(f"{self.name} has an output head of its own: leave --untie out")
        self.stored, self._origins = with_a_head(self.stored, self.name)
        self.specs, _ = with_a_head(self.specs, self.name)
        self.config = untied(self.config, self.name)

    def _settle_tie(self) -> None:
        """Take a head that is stored beside the embedding it is tied to for what it is.

        The same once more, which is left out; or another, and then it is not tied.
        """
        if (ends := stored_twice(self.stored, self.config)) is None:
            return
        head, embeddings = ends
        if any(self._are_equal(head, embedding) for embedding in embeddings):
            self.stored = {name: spec for name, spec in self.stored.items() if name != head}
            return
        self.config = untied(self.config, self.name)
        self.faults.append(
            f"{self.name}: its config ties {head} to {embeddings[0]}, and its files hold two that "
            "differ: read as a head of its own (tie_word_embeddings false)"
        )

    def _leave_out_copies(self) -> None:
        """An encoder's and a decoder's embedding are left out where they are the shared one again.

        As transformers did write them, and now does not.
        """
        if (found := shared_embedding(self.stored)) is None:
            return
        shared, others = found
        copies = {name for name in others if self._are_equal(name, shared)}
        self.stored = {name: spec for name, spec in self.stored.items() if name not in copies}

    def _are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors are the same bit for bit; as little is read as tells."""
        spec = self.stored[one]
        if spec != self.stored[other]:
            return False
        length = spec.shape[0] if spec.shape else 1
        rows = max(_COMPARED * length // max(spec.nbytes, 1), 1)
        return all(
            self.read_rows(one, start, start + rows).tobytes()
            == self.read_rows(other, start, start + rows).tobytes()
            for start in range(0, length, rows)
        )

    def drop(self, name: str) -> None:
        """Tell the system that it need not keep the bytes of tensor `name` in its cache.

        Those of adapters, small and read for many tensors, stay.
        """
        name = self._stored_as(name)
        if file := self._file_of.get(name):
            file.drop(name)

    def changed(self) -> Path | None:
        """The first weight file, of the model or an adapter, that is not what it was when opened.

        None if all are. Compares size, times and inode; reads only those that differ in these.
        """
        return next((file.path for file in self._files if not _is_as_opened(file)), None)

    def fingerprint(self, *, content: bool = True) -> dict[str, list[Any]]:
        """What tells this model from another: [size, checksum] by the path of each file.

        The checksum is of all of the file's content, which is read for it once. Without `content`
        weight files have [size, mtime_ns, ctime_ns, sha256 of the header] (None for a .bin, which
        has none) instead, and no tensor is read. Plain values, equal after a passage through JSON.
        """
        found: dict[str, list[Any]] = {}
        for file in self._files:
            now = file.opened.identity
            with storage_faults(f"read {file.path}"):
                found[_key(file.path)] = (
                    [now.size, file.opened.checksum()]
                    if content
                    else [now.size, now.mtime_ns, now.ctime_ns, file.header_hash]
                )
        names = (CONFIG_NAME, ADAPTER_CONFIG, *INDICES)
        for path in (folder / name for folder in (self.folder, *self.adapters) for name in names):
            if os.path.isfile(path):
                found[_key(path)] = list(file_checksum(path).values())
        return found


def open_checkpoint(spec: str | Path, *, look: bool = False) -> Checkpoint:
    """Open a model as the user names it, as `find_parts` reads it.

    InputError if anything is missing, malformed or unsafe, or quantised, unless it is only to
    `look` at.
    """
    parts = find_parts(str(spec))
    base, *adapters = (part.folder for part in parts)
    model = Checkpoint(str(spec), base, tuple(adapters), look=look)
    model.full_name = "+".join(part.name for part in parts)
    return model


def file_warnings(models: Iterable[Checkpoint]) -> list[str]:
    """The warnings of all models' files, each once."""
    return list(dict.fromkeys(line for model in models for line in model.warnings))


def older_folders(models: Sequence[Checkpoint]) -> list[Path]:
    """The folders of all models but the last, those of the one before it first."""
    return [folder for model in reversed(models[:-1]) for folder in model.tokenizer_folders]


def _is_as_opened(file: WeightFile) -> bool:
    try:
        return file.opened.is_unchanged(FileIdentity.of(file.path))
    except OSError:  # it is gone
        return False


def _key(path: Path) -> str:
    return os.path.realpath(path)
