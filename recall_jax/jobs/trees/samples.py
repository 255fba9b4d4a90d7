"""Read samples for a user's forward function: texts with a tokenizer, token ids, or arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recall_jax.checkpoint.companions import CONFIG_NAME
from recall_jax.checkpoint.npz import NpzTree
from recall_jax.errors import InputError
from recall_jax.files.json_objects import read_json_object
from recall_jax.inputs.batches import make_batches
from recall_jax.inputs.data import draw_indices, draw_rows, read_rows
from recall_jax.inputs.samples import INPUT_IDS, Tokenized, read_pool, read_typical
from recall_jax.inputs.settings import Samples
from recall_jax.inputs.tokens import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class ArrayRows:
    """Hold n rows of arrays, such as images, with n on axis 0; `indices` as in `Tokenized`."""

    indices: np.ndarray  # (n,) int64
    arrays: Mapping[str, np.ndarray]

    def take(self, rows: Sequence[int] | np.ndarray) -> "ArrayRows":
        """Return these rows, counted from 0."""
        arrays = {name: array[rows] for name, array in self.arrays.items()}
        return ArrayRows(self.indices[rows], arrays)


TreeSamples = Tokenized | ArrayRows


def read_tree_samples(settings: Samples) -> TreeSamples:
    """Read at most `pool` rows to choose from, or all rows of a file of typical samples.

    A .npz file holds arrays with the rows on axis 0; a file of texts needs the recipe's tokenizer,
    unless its rows have `input_ids`. Raises InputError if the file is invalid.
    """
    name = settings.typical or settings.data
    assert name is not None, "a recipe names data or typical"
    path = Path(name)
    if path.suffix == ".npz":
        rows = _read_arrays(path, settings)
        if settings.typical is not None:
            return rows
        return rows.take(draw_indices(len(rows.indices), settings.pool, settings.seed))
    if settings.tokenizer is not None:
        tokenizer = _tokenizer(Path(settings.tokenizer))
        if settings.typical is not None:
            return read_typical(
                path, tokenizer, fields=settings.fields, max_tokens=settings.max_tokens
            )
        return read_pool(
            path,
            tokenizer,
            fields=settings.fields,
            max_tokens=settings.max_tokens,
            pool=settings.pool,
            seed=settings.seed,
        )
    return _read_token_ids(path, settings)


def batches_of(samples: TreeSamples, batch_size: int) -> tuple[list[dict[str, np.ndarray]], Any]:
    """Return batches for a forward, and the position of each row in the concatenated batches.

    Batches of texts are {"input_ids", "attention_mask"}, both (B, T) int32, padded on the right.
    """
    if isinstance(samples, Tokenized):
        tokens = make_batches(samples.token_ids, batch_size)
        return [batch.as_dict() for batch in tokens.batches], tokens.order
    total = len(samples.indices)
    batches = [
        {name: array[start : start + batch_size] for name, array in samples.arrays.items()}
        for start in range(0, total, batch_size)
    ]
    return batches, np.arange(total)


def _tokenizer(folder: Path) -> Tokenizer:
    config = folder / CONFIG_NAME  # if the folder is that of a model
    model_type = read_json_object(config).get("model_type") if config.is_file() else None
    return load_tokenizer([folder], str(model_type))


def _read_arrays(path: Path, settings: Samples) -> ArrayRows:
    if not path.is_file():
        raise InputError(f"no data file {path}")
    if settings.fields.named or settings.tokenizer is not None:
        raise InputError(f"{path} holds arrays: remove samples.field and samples.tokenizer")
    file = NpzTree(str(path), path)
    lengths = {name: spec.shape[:1] for name, spec in file.specs.items()}
    if len(set(lengths.values())) > 1 or () in lengths.values() or (0,) in lengths.values():
        shapes = [f"{name} {list(spec.shape)}" for name, spec in file.specs.items()]
        listed = ", ".join(shapes[:3]) + ", …" * (len(shapes) > 3)
        raise InputError(f"{path}: its arrays do not all start with the same rows ({listed})")
    arrays = {name: file.read(name) for name in file.specs}
    return ArrayRows(np.arange(next(iter(lengths.values()))[0]), arrays)


def _read_token_ids(path: Path, settings: Samples) -> Tokenized:
    if settings.fields.named:
        raise InputError("samples.field is for texts: add samples.tokenizer, or remove field")
    if settings.typical is not None:
        rows = read_rows(path)
        indices = np.arange(len(rows))
    else:
        indices, rows = draw_rows(path, settings.pool, settings.seed)
    ids = []
    for index, row in zip(indices, rows, strict=True):
        tokens = row.get(INPUT_IDS)
        if tokens is None:
            raise InputError(
                f"{path}, row {index} (from 0) has no {INPUT_IDS}: add samples.tokenizer, the "
                "folder of the tokenizer that the models read texts with"
            )
        valid = isinstance(tokens, list) and all(type(i) is int and 0 <= i < 2**31 for i in tokens)
        if not valid or not tokens:
            raise InputError(f"{path}, row {index} (from 0): {INPUT_IDS} is no list of token ids")
        ids.append(tokens[: settings.max_tokens])
    texts = tuple(str(row.get("text", "")) for row in rows)
    return Tokenized(indices, tuple(rows), texts, tuple(ids))
