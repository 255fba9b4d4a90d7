"""Compute the loss of a decoder on the counted tokens of a batch."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from recall_jax.checkpoint.units import EMBED
from recall_jax.models.architecture import Architecture
from recall_jax.models.forward import Params, forward
from recall_jax.models.lora import LoraSpec
from recall_jax.models.loss import next_token_loss
from recall_jax.parallel.mesh import gathered, rows_sharding
from recall_jax.training.step import TrainingBatch

Array = jax.Array


def completion_loss(
    arch: Architecture,
    params: Params,
    batch: TrainingBatch,
    *,
    dtype: Any = jnp.float32,
    remat: bool = False,
    lora: Params | None = None,
    lora_spec: LoraSpec | None = None,
    dropout_key: Array | None = None,
    mesh: Mesh | None = None,
) -> tuple[Array, Array]:
    """Return the summed cross-entropy of the tokens in `loss_mask`, and their number; float32 ().

    The forward runs in `dtype`, whatever the dtype of `params`; logits are float32. A row's first
    token has no context and is never counted. With `remat`, blocks are recomputed in the backward
    pass, so that only their inputs are stored. See `forward` for the adapter's arguments. On a
    `mesh`, rows and hidden states are sharded over the axes `data` and `fsdp`.
    """
    input_ids, attention_mask, loss_mask = map(jnp.asarray, batch)
    if mesh is not None:
        params = {**params, EMBED: gathered(params[EMBED], mesh)}
    _, normed = forward(
        arch,
        params,
        input_ids,
        attention_mask,
        observe=lambda _: (),
        dtype=dtype,
        remat=remat,
        lora=lora,
        lora_spec=lora_spec,
        dropout_key=dropout_key,
        rows=None if mesh is None else rows_sharding(mesh),
    )
    return next_token_loss(arch, params, normed, input_ids, loss_mask)
