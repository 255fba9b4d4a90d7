"""Open a model that the user names: a folder or a hub model, with LoRA adapters folded in."""

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
from recall_jax.checkpoint.parameter_names import decoder_prefixes, is_buffer
from recall_jax.checkpoint.quantised import quantised_by, quantised_tensor
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.ties import (
    is_tied,
    shared_embedding,
    stored_twice,
    untied,
    with_separate_head,
)
from recall_jax.errors import InputError, storage_faults
from recall_jax.files.checksums import file_checksum
from recall_jax.files.identity import FileIdentity

_COMPARED = 1 << 22  # bytes of two tensors compared at a time


class Checkpoint:
    """Read a model on disk: its config, and its parameters one at a time.

    `full_name` is made of absolute paths and hub ids. Buffers that are not parameters are ignored.
    `specs` describe the tensors as `read` gives them, float32 where an adapter changes them;
    `stored` describes them in the dtypes of the base, which an output has by default. `config` is
    config.json with the changes of adapters, and with the head untied if the files hold a head that
    differs from the embedding; a line of `faults` then reports it. `notes` are lines about other
    parts of the files that are not read. `quantised` says how we know that the weights are
    quantised; it is None for any model not opened with `headers_only`.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        adapters: tuple[Path, ...] = (),
        *,
        headers_only: bool = False,
    ) -> None:
        """Read the config and every header, but no weights.

        Raises InputError if anything is missing, malformed or unsafe, or if the weights are
        quantised, unless `headers_only` says that no tensor will be read.
        """
        self.name = name
        self.full_name = "+".join(str(path.resolve()) for path in (folder, *adapters))
        self.folder = folder
        self.adapters = adapters
        self.config = read_config(folder)
        self.faults: list[str] = []
        self.quantised: str | None = None
        allowed = headers_only and not adapters
        if method := quantised_by(self.config):
            self._note_quantised(f"quantization_config in its config.json: {method}", allowed)
        self._file_of, self.notes = weight_files(folder)
        self._in_files: dict[str, str] = {}  # names in the files of renamed tensors
        self.stored: Mapping[str, TensorSpec] = {
            tensor: file.specs[tensor]
            for tensor, file in self._file_of.items()
            if not is_buffer(tensor, file.specs[tensor])
        }
        if not self.stored:
            raise InputError(f"{folder}: its weights hold no parameters")
        refuse_empty(self.stored, name)
        if self.quantised is None and (tensor := quantised_tensor(self.stored)):
            self._note_quantised(f"tensor {tensor}", allowed)
        self._bytes_read = 0
        self._files = list(dict.fromkeys(self._file_of.values()))
        self._bound: list[BoundAdapter] = []
        self._origins: Mapping[str, str] = {}
        self._folded: tuple[str, np.ndarray] | None = None  # the last tensor folded for `read_rows`
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
        self.rename(decoder_prefixes(self.stored))

    def _note_quantised(self, reason: str, allowed: bool) -> None:
        self.quantised = reason
        if not allowed:
            raise InputError(
                f"{self.name} is quantised ({reason}): such numbers can be neither merged nor run "
                "here; take the model in bfloat16, float16 or float32 that it was made from, or "
                "remove the quantization_config if the weights are floats after all"
            )

    @property
    def tokenizer_folders(self) -> tuple[Path, ...]:
        """Return the folders to look in for the tokenizer; an adapter may bring one."""
        return (*reversed(self.adapters), self.folder)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors as stored, adapters folded in."""
        return sum(spec.nbytes for spec in self.stored.values())

    @property
    def bytes_read(self) -> int:
        """Return the number of weight bytes read so far, including those of adapters."""
        return self._bytes_read + sum(bound.bytes_read for bound in self._bound)

    @property
    def warnings(self) -> list[str]:
        """Return what the user of the model should know: its faults and notes."""
        return [*self.faults, *self.notes]

    def rename(self, names: Mapping[str, str]) -> None:
        """Rename tensors: `names` maps present names to new ones."""
        self._in_files |= {new: self._in_files.get(old, old) for old, new in names.items()}
        self.stored = {names.get(name, name): spec for name, spec in self.stored.items()}
        self.specs = {names.get(name, name): spec for name, spec in self.specs.items()}

    def read(self, name: str) -> np.ndarray:
        """Read tensor `name`, C-contiguous, with the dtype and shape in `specs`.

        Returns a read-only view of the file if no adapter changes the tensor. KeyError if unknown.
        """
        return self._read(self._stored_as(name), len(self._bound))

    def _stored_as(self, name: str) -> str:
        """Return the name in the files of the tensor that is now called `name`."""
        name = self._in_files.get(name, name)
        name = self._origins.get(name, name)
        return self._in_files.get(name, name)

    def _read(self, name: str, adapters: int) -> np.ndarray:
        """Read tensor `name` with the first `adapters` adapters folded in."""
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
        """Return rows `start` to `stop` of the result of `read`; a scalar is one row, (1,).

        Reads only these rows of a tensor that no adapter changes. A changed tensor is folded
        completely and kept until the next one, so that reading it in parts folds it once.
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
        """Give the model a separate output head that starts as a copy of the embedding.

        Raises InputError if it has a head already, or its embedding is ambiguous.
        """
        if not is_tied(self.stored, self.config):
            raise InputError(f"{self.name} has a separate output head already: leave --untie out")
        self.stored, self._origins = with_separate_head(self.stored, self.name)
        self.specs, _ = with_separate_head(self.specs, self.name)
        self.config = untied(self.config, self.name)

    def _settle_tie(self) -> None:
        """Compare a stored head with the embedding that the config ties it to.

        A copy is dropped; a head that differs is kept, and the config untied.
        """
        if (ends := stored_twice(self.stored, self.config)) is None:
            return
        head, embeddings = ends
        if any(self._are_equal(head, embedding) for embedding in embeddings):
            self.stored = {name: spec for name, spec in self.stored.items() if name != head}
            return
        self.config = untied(self.config, self.name)
        self.faults.append(
            f"{self.name}: its config ties {head} to {embeddings[0]}, and its files have two that "
            "differ: read as a separate head (tie_word_embeddings false)"
        )

    def _leave_out_copies(self) -> None:
        """Drop copies of the shared embedding from an encoder and a decoder.

        Older versions of transformers wrote them, newer ones do not.
        """
        if (found := shared_embedding(self.stored)) is None:
            return
        shared, others = found
        copies = {name for name in others if self._are_equal(name, shared)}
        self.stored = {name: spec for name, spec in self.stored.items() if name not in copies}

    def _are_equal(self, one: str, other: str) -> bool:
        """Return whether two tensors are equal bit for bit, reading no more than needed."""
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
        """Tell the system that it need not cache the bytes of tensor `name`.

        The bytes of adapters, which are small and read for many tensors, stay.
        """
        name = self._stored_as(name)
        if file := self._file_of.get(name):
            file.drop(name)

    def changed(self) -> Path | None:
        """Return the first weight file that has changed since it was opened, or None.

        Includes the files of adapters. Compares size, times and inode; reads only files that differ
        in these.
        """
        return next((file.path for file in self._files if not _is_as_opened(file)), None)

    def fingerprint(self, *, content: bool = True) -> dict[str, list[Any]]:
        """Return what identifies the model: [size, checksum] for the path of each file.

        The checksum covers the file's content, which is read once for it. Without `content`, weight
        files have [size, mtime_ns, ctime_ns, sha256 of the header] instead (None for a .bin, which
        has no header), and no tensor is read. The values stay equal when written as JSON and read
        back.
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


def open_checkpoint(spec: str | Path, *, headers_only: bool = False) -> Checkpoint:
    """Open the model that the user names, as `find_parts` reads it.

    Raises InputError if anything is missing, malformed or unsafe, or if the weights are quantised,
    unless `headers_only` says that no tensor will be read.
    """
    parts = find_parts(str(spec))
    base, *adapters = (part.folder for part in parts)
    model = Checkpoint(str(spec), base, tuple(adapters), headers_only=headers_only)
    model.full_name = "+".join(part.name for part in parts)
    return model


def file_warnings(models: Iterable[Checkpoint]) -> list[str]:
    """Return the warnings about all models' files, without duplicates."""
    return list(dict.fromkeys(line for model in models for line in model.warnings))


def older_folders(models: Sequence[Checkpoint]) -> list[Path]:
    """Return the folders of all models but the last, newest first."""
    return [folder for model in reversed(models[:-1]) for folder in model.tokenizer_folders]


def _is_as_opened(file: WeightFile) -> bool:
    try:
        return file.opened.is_unchanged(FileIdentity.of(file.path))
    except OSError:  # it is gone
        return False


def _key(path: Path) -> str:
    return os.path.realpath(path)
