"""Check the input models and read the samples of a run, before the first weight is read."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from recall_jax.checkpoint.dtypes import DTYPES
from recall_jax.checkpoint.folder import Checkpoint, older_folders
from recall_jax.checkpoint.tensors import shapes_of
from recall_jax.engine.batching import Passes
from recall_jax.engine.budget import memory_budget, room_for_rows
from recall_jax.engine.drawn_samples import draw_samples
from recall_jax.engine.layout import ON_HOST, Layout
from recall_jax.engine.plan import ConfiguredModel, NamedModel
from recall_jax.engine.select import choose_typical
from recall_jax.errors import InputError, UnfinishedError
from recall_jax.files.progress import Progress, silent
from recall_jax.inputs.samples import (
    Tokenized,
    check_readers,
    check_vocabulary,
    read_pool,
    read_typical,
)
from recall_jax.inputs.settings import Samples
from recall_jax.inputs.tokens import Tokenizer, load_tokenizer
from recall_jax.inputs.vocabularies import tokenizer_differences
from recall_jax.models.architecture import Architecture
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import check_tensors
from recall_jax.models.differences import architecture_differences, describe_differences
from recall_jax.models.shapes import check_sizes
from recall_jax.representations.typical import Typical, every_row


def common_architecture(
    models: Sequence[ConfiguredModel], ignore_config: Collection[str] = ()
) -> Architecture:
    """Return the architecture that all models share, after checking their tensors against it.

    Raises InputError if the models differ, or if tensors do not have the shapes of their config.
    """
    shapes = [shapes_of(model.specs) for model in models]
    for model, found in zip(models, shapes, strict=True):
        check_sizes(model.config, found, f"{model.name}/config.json")
    architectures = [
        read_architecture(model.config, ignore=ignore_config, where=f"{model.name}/config.json")
        for model in models
    ]
    expected = architectures[-1]
    for model, arch, found in zip(models, architectures, shapes, strict=True):
        if lines := describe_differences(
            architecture_differences(arch, expected), model.name, models[-1].name
        ):
            raise InputError(f"{'; '.join(lines)}: merge models of one architecture")
        check_tensors(arch, found, model.name)
    return expected


def compute_dtype(name: str | None, model: Checkpoint) -> DTypeLike:
    """Return the dtype of the forward: `name`, else bfloat16 for bfloat16 models on accelerators.

    In all other cases it is float32. Raises InputError for another `name`.
    """
    if name is not None:
        if name not in ("float32", "bfloat16"):
            raise InputError(f"compute dtype {name!r}: use float32 or bfloat16")
        return DTYPES[name].type
    stored = {spec.dtype for spec in model.stored.values()}
    if jax.default_backend() != "cpu" and DTYPES["bfloat16"] in stored:
        return jnp.bfloat16
    return jnp.float32


class HasIndices(Protocol):
    """Describe rows of data with their positions in the file."""

    @property
    def indices(self) -> np.ndarray:
        """Return the position (n,) int64 of each row, counted from 0."""


RowsT = TypeVar("RowsT", bound=HasIndices)


@dataclass(frozen=True)
class Selection:
    """Hold the typical rows of a pool as JSON values; `rows` is None if all samples were given.

    The fields are those of `Typical`; `passes` counts those over the model that selected the rows,
    not counting the pass of the merge.
    """

    rows: list[int] | None
    cluster_sizes: list[int]
    inertia: float
    silhouette: float | None
    clusters: int
    passes: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Selection":
        """Return the selection that `to_json` converted to these values."""
        return cls(**values)

    def take_from(self, pool: Tokenized) -> "TypicalSamples[Tokenized]":
        """Return the selected samples of the pool."""
        if self.rows is None:
            return TypicalSamples(pool, None, 0)
        typical = Typical(
            np.asarray(self.rows, np.int64),
            np.asarray(self.cluster_sizes, np.int64),
            self.inertia,
            self.silhouette,
            self.clusters,
        )
        return TypicalSamples(pool.take(typical.rows), typical, self.passes)


@dataclass(frozen=True)
class TypicalSamples(Generic[RowsT]):
    """Hold the typical samples of a run, and how they were found."""

    samples: RowsT
    typical: Typical | None  # None if the samples were given
    passes: int  # over the model that chose them, in addition to the merge's pass

    @property
    def selection(self) -> Selection:
        """Return how the samples were found, as JSON values."""
        found = self.typical
        if found is None:
            return Selection(None, [], 0.0, None, 0, 0)
        rows, sizes = found.rows.tolist(), found.cluster_sizes.tolist()
        return Selection(rows, sizes, found.inertia, found.silhouette, found.clusters, self.passes)


def find_typical(
    settings: Samples,
    pool: Tokenized,
    model: NamedModel,
    arch: Architecture,
    *,
    passes: Passes | None,
    dtype: DTypeLike,
    layout: Layout = ON_HOST,
    progress: Progress = silent,
) -> TypicalSamples[Tokenized]:
    """Return the typical rows of the pool: chosen by `model` in the planned passes, or all rows."""
    if settings.typical is not None:
        return TypicalSamples(pool, None, 0)
    if passes is None:
        return TypicalSamples(pool, every_row(len(pool.rows)), 0)
    typical = choose_typical(
        settings,
        pool.token_ids,
        model,
        arch,
        passes=passes,
        dtype=dtype,
        layout=layout,
        progress=progress,
    )
    return TypicalSamples(pool.take(typical.rows), typical, len(passes.rows))


def check_same_texts(digest: object, samples: Tokenized, model: str) -> None:
    """Raise UnfinishedError if an interrupted merge used samples other than these."""
    if digest != samples.digest():
        raise UnfinishedError(
            f"the texts or the tokenizer of {model} are not what they were when the merge was "
            "interrupted: restore them, or run without --resume to start afresh"
        )


def model_tokenizer(
    reader: Checkpoint, models: Sequence[Checkpoint], arch: Architecture
) -> Tokenizer:
    """Return the tokenizer of `reader`, or that of the newest model that has one."""
    return load_tokenizer(reader.tokenizer_folders, arch.family, older_folders([*models, reader]))


def read_samples(
    settings: Samples,
    reader: Checkpoint,
    models: Sequence[Checkpoint],
    arch: Architecture,
    *,
    ignore_tokenizers: bool = False,
    budget: int | None = None,
) -> Tokenized:
    """Return the rows to choose from, or the typical rows if given, tokenised for `reader`.

    If the source needs no data, they are drawn from `reader`. `budget` is the memory budget in
    bytes. Raises InputError if one of the models would read other texts in the tokens, unless
    `ignore_tokenizers`, and if the rows do not fit in memory.
    """
    memory = room_for_rows(memory_budget(budget))
    tokenizer = model_tokenizer(reader, models, arch)
    if settings.source != "data":
        samples = draw_samples(settings, reader, arch, tokenizer)
    elif settings.typical is not None:
        samples = read_typical(
            Path(settings.typical),
            tokenizer,
            fields=settings.fields,
            max_tokens=settings.max_tokens,
            memory=memory,
        )
    else:
        assert settings.data is not None, "a recipe names data or typical"
        samples = read_pool(
            Path(settings.data),
            tokenizer,
            fields=settings.fields,
            max_tokens=settings.max_tokens,
            pool=settings.pool,
            seed=settings.seed,
            memory=memory,
        )
    check_vocabulary(samples, arch.vocab_size, reader.name)
    if not ignore_tokenizers:
        check_readers(samples, tokenizer_differences(reader, models))
    return samples
