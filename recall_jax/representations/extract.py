"""Extraction: pooled hidden states of every unit, pooled inside the compiled program.

Three backends run the same program: `jit` on one device, `shard_map` over the data axis of a
mesh, `pmap` over all local devices. A batch that does not divide is filled with empty rows, which
are dropped again, so that every backend takes any number of rows.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from recall_jax.errors import InputError
from recall_jax.representations.pooling import masked_mean

Backend = Literal["jit", "shard_map", "pmap"]
ApplyFn = Callable[[Any, Any], Iterable[jax.Array]]
MaskOf = Callable[[Any], Any]


def extract(
    apply_fn: ApplyFn,
    params: Any,
    batches: Iterable[Any],
    *,
    mask: MaskOf | None = None,
    backend: Backend = "jit",
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Pooled hidden states (U, n, E) float32 of all rows of `batches`, in their order.

    `apply_fn(params, batch)` returns U arrays, each (B, T, E_u) or already pooled (B, E_u);
    units narrower than the widest are padded with zeros, which changes no distance and no inner
    product. A batch is {"input_ids", "attention_mask"}, both (B, T), or any pytree whose leaves
    start with B; then `mask(batch)` gives the (B, T) mask. Nothing of size (U, n, T, E) exists.
    `mesh` is for `shard_map`: its first axis is the data axis (default: all local devices). With
    `jit` it is the one that `params` are spread over, by several processes too.

    Raises InputError where there is no batch, or shapes do not fit.
    """
    program = _program(apply_fn, mask, backend, mesh)
    if mesh is None or backend != "jit":  # else they are spread already
        params = jax.device_put(params, program.params_sharding)  # once, not with every batch
    rows_per_batch = 0
    pending: tuple[jax.Array, int] | None = None
    pieces = []
    for batch in batches:
        rows = num_rows(batch)
        rows_per_batch = max(rows_per_batch, -(-rows // program.devices) * program.devices)
        pooled = program.run(params, _fill_rows(batch, rows_per_batch))
        # One batch behind: the device works on this batch while the last one is copied.
        if pending is not None:
            pieces.append(np.asarray(pending[0])[:, : pending[1]])
        pending = pooled, rows
    if pending is None:
        raise InputError("there is no batch to extract from: give at least one")
    pieces.append(np.asarray(pending[0])[:, : pending[1]])
    return np.concatenate(pieces, axis=1)


def _pooled_units(apply_fn: ApplyFn, mask: MaskOf | None, params: Any, batch: Any) -> jax.Array:
    """(U, B, E) float32, the narrower units padded with zeros."""
    if mask is not None:
        attention_mask = mask(batch)
    else:
        attention_mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    pooled = [masked_mean(hidden, attention_mask) for hidden in apply_fn(params, batch)]
    if not pooled:
        raise InputError("apply_fn returned no units: return one array for each unit")
    width = max(states.shape[-1] for states in pooled)
    return jnp.stack([jnp.pad(p, ((0, 0), (0, width - p.shape[-1]))) for p in pooled])


class _Program(NamedTuple):
    run: Callable[[Any, Any], jax.Array]
    devices: int  # that share a batch
    params_sharding: NamedSharding | None


# The models that one apply_fn serves share its compiled program.
@lru_cache(maxsize=8)
def _program(
    apply_fn: ApplyFn, mask: MaskOf | None, backend: Backend, mesh: Mesh | None
) -> _Program:
    if mesh is not None and backend == "pmap":
        raise InputError("mesh= goes with backend='shard_map' or 'jit', not with 'pmap'")
    function = partial(_pooled_units, apply_fn, mask)
    if backend == "jit":
        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        return _Program(jax.jit(function, out_shardings=everywhere), 1, None)
    mesh = mesh or jax.make_mesh(
        (jax.local_device_count(),), ("data",), axis_types=(AxisType.Auto,)
    )
    axis = mesh.axis_names[0]
    replicated = NamedSharding(mesh, PartitionSpec())
    if backend == "shard_map":
        sharded = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(axis)),
            out_specs=PartitionSpec(None, axis),
            # The check refuses a scan of apply_fn's that starts from zeros, as a recurrence does.
            check_vma=False,
        )
        return _Program(jax.jit(sharded), mesh.shape[axis], replicated)
    if backend == "pmap":
        return _Program(_pmapped(function), jax.local_device_count(), replicated)
    raise InputError(f"unknown backend {backend!r}: use 'jit', 'shard_map' or 'pmap'")


def _pmapped(function: Callable[[Any, Any], jax.Array]) -> Callable[[Any, Any], jax.Array]:
    """`function` with the rows of a batch split over the local devices."""
    num_devices = jax.local_device_count()
    parallel = jax.pmap(function, in_axes=(None, 0), out_axes=1)

    def run(params: Any, batch: Any) -> jax.Array:
        split = jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)
        pooled = parallel(params, split)  # (U, devices, B / devices, E)
        return pooled.reshape(pooled.shape[0], -1, pooled.shape[-1])

    return run


def num_rows(batch: Any) -> int:
    """Number of rows B that every leaf of a batch starts with, or InputError."""
    rows = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(rows) != 1 or rows == {()}:
        raise InputError("the leaves of a batch must all start with the same number of rows")
    return int(rows.pop()[0])


def _fill_rows(batch: Any, rows: int) -> Any:
    """The batch with zero rows added at the end up to `rows`."""

    def fill(leaf: Any) -> Any:
        missing = rows - leaf.shape[0]
        xp = jnp if isinstance(leaf, jax.Array) else np
        return xp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)) if missing else leaf

    return jax.tree.map(fill, batch)
