"""Extract pooled hidden states of every unit, pooled inside the compiled program.

Three backends run the same program: `jit` on one device, `shard_map` over the data axis of a mesh,
`pmap` over all local devices. A batch that the devices do not divide is padded with empty rows,
which are dropped from the result, so that every backend takes any number of rows.
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
    """Return pooled hidden states (U, n, E) float32 of all rows of `batches`, in their order.

    `apply_fn(params, batch)` returns U arrays, each (B, T, E_u) or already pooled (B, E_u); units
    narrower than the widest are padded with zeros, which changes no distance and no inner product.
    A batch is {"input_ids", "attention_mask"}, both (B, T), or any pytree whose leaves start with
    B; then `mask(batch)` returns the (B, T) mask. No array of size (U, n, T, E) is allocated. For
    `shard_map`, the first axis of `mesh` is the data axis (default: all local devices). For `jit`,
    `mesh` is the one over which `params` are sharded, possibly by several processes.

    Raises InputError if there is no batch, or shapes do not match.
    """
    program = _program(apply_fn, mask, backend, mesh)
    if mesh is None or backend != "jit":  # else they are sharded already
        params = jax.device_put(params, program.params_sharding)  # once for all batches
    rows_per_batch = 0
    pending: tuple[jax.Array, int] | None = None
    pieces = []
    for batch in batches:
        rows = num_rows(batch)
        rows_per_batch = max(rows_per_batch, -(-rows // program.devices) * program.devices)
        pooled = program.run(params, _fill_rows(batch, rows_per_batch))
        # Copy the previous batch's result while the device computes this one.
        if pending is not None:
            pieces.append(np.asarray(pending[0])[:, : pending[1]])
        pending = pooled, rows
    if pending is None:
        raise InputError("there is no batch to extract from: give at least one")
    pieces.append(np.asarray(pending[0])[:, : pending[1]])
    return np.concatenate(pieces, axis=1)


def _pooled_units(apply_fn: ApplyFn, mask: MaskOf | None, params: Any, batch: Any) -> jax.Array:
    """Return pooled states (U, B, E) float32, with narrower units padded with zeros."""
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
    devices: int  # number of devices that share a batch
    params_sharding: NamedSharding | None


# Models with the same apply_fn share its compiled program.
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
            # The check would refuse an apply_fn whose scan starts from zeros, as a recurrence does.
            check_vma=False,
        )
        return _Program(jax.jit(sharded), mesh.shape[axis], replicated)
    if backend == "pmap":
        return _Program(_pmapped(function), jax.local_device_count(), replicated)
    raise InputError(f"unknown backend {backend!r}: use 'jit', 'shard_map' or 'pmap'")


def _pmapped(function: Callable[[Any, Any], jax.Array]) -> Callable[[Any, Any], jax.Array]:
    """Map `function` over the local devices, with the rows of a batch split between them."""
    num_devices = jax.local_device_count()
    parallel = jax.pmap(function, in_axes=(None, 0), out_axes=1)

    def run(params: Any, batch: Any) -> jax.Array:
        split = jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)
        pooled = parallel(params, split)  # (U, devices, B / devices, E)
        return pooled.reshape(pooled.shape[0], -1, pooled.shape[-1])

    return run


def num_rows(batch: Any) -> int:
    """Return the number of rows B that every leaf of a batch starts with, or raise InputError."""
    rows = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(rows) != 1 or rows == {()}:
        raise InputError("the leaves of a batch must all start with the same number of rows")
    return int(rows.pop()[0])


def _fill_rows(batch: Any, rows: int) -> Any:
    """Append zero rows to the batch until it has `rows`."""

    def fill(leaf: Any) -> Any:
        missing = rows - leaf.shape[0]
        xp = jnp if isinstance(leaf, jax.Array) else np
        return xp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)) if missing else leaf

    return jax.tree.map(fill, batch)
