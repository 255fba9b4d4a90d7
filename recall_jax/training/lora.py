"""Train LoRA adapters: initialise the factors, compute the loss, fold them or save them.

Hu et al. 2021 (arXiv:2106.09685). The factors are a float32 tree that mirrors the modules of a
block, {"layers": {"self_attn": {"q_proj": {"a": (L, in, r), "b": (L, r, out)}}, …}}: the transposes
of peft's lora_A and lora_B, stacked over the L layers.
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from recall_jax.checkpoint.lora_save import Factors, save_adapter
from recall_jax.models.architecture import LAYERS, Architecture
from recall_jax.models.forward import Params, init_params
from recall_jax.models.lora import LoraSpec, adapted_modules
from recall_jax.training.loss import completion_loss
from recall_jax.training.step import Loss, TrainingBatch

Array = jax.Array


def init_lora(arch: Architecture, spec: LoraSpec, key: Array) -> Params:
    """Return initial factors as peft does: A is uniform on ±1 / sqrt(in), B is zero.

    This is Kaiming's uniform distribution with a = sqrt(5); the adapted model equals its base.
    Raises InputError for target modules that `arch` does not have.
    """
    shapes = flatten_dict(jax.eval_shape(lambda: init_params(arch, key))[LAYERS], sep="/")
    factors = {}
    for index, path in enumerate(adapted_modules(arch, spec)):
        layers, inputs, outputs = shapes[f"{path}/kernel"].shape
        bound = 1 / math.sqrt(inputs)
        module_key = jax.random.fold_in(key, index)
        shape = (layers, inputs, spec.r)
        factors[f"{path}/a"] = jax.random.uniform(module_key, shape, jnp.float32, -bound, bound)
        factors[f"{path}/b"] = jnp.zeros((layers, spec.r, outputs), jnp.float32)
    return {LAYERS: unflatten_dict(factors, sep="/")}


def lora_loss(
    arch: Architecture,
    spec: LoraSpec,
    *,
    dtype: Any = jnp.float32,
    remat: bool = False,
    mesh: Mesh | None = None,
) -> Loss:
    """Return `completion_loss` as a function of the factors; `frozen["base"]` is the base model."""

    def loss(
        trainable: Params, frozen: Params, batch: TrainingBatch, key: Array | None
    ) -> tuple[Array, Array]:
        return completion_loss(
            arch,
            frozen["base"],
            batch,
            dtype=dtype,
            remat=remat,
            lora=trainable,
            lora_spec=spec,
            dropout_key=key,
            mesh=mesh,
        )

    return loss


def fold(params: Params, lora: Params, spec: LoraSpec) -> Params:
    """Return parameters with the adapter folded in: W + scale A B in float32, rounded once."""
    layers = flatten_dict(params[LAYERS], sep="/")
    factors = flatten_dict(lora[LAYERS], sep="/")
    for path in dict.fromkeys(name.rpartition("/")[0] for name in factors):
        kernel = layers[f"{path}/kernel"]
        update = jnp.matmul(factors[f"{path}/a"], factors[f"{path}/b"], precision="highest")
        folded = kernel.astype(jnp.float32) + spec.scale * update
        layers[f"{path}/kernel"] = folded.astype(kernel.dtype)
    return {**params, LAYERS: unflatten_dict(layers, sep="/")}


def save_lora(
    folder: Path, arch: Architecture, lora: Params, spec: LoraSpec, *, base_model: str
) -> None:
    """Write the adapter in peft's format into an existing `folder`."""
    stacked = flatten_dict(lora[LAYERS], sep="/")
    factors = {}
    for layer in range(arch.num_hidden_layers):
        for path, name in adapted_modules(arch, spec).items():
            a, b = (np.asarray(stacked[f"{path}/{factor}"][layer]).T for factor in ("a", "b"))
            factors[f"model.layers.{layer}.{name}"] = Factors(a, b)
    save_adapter(
        folder,
        factors,
        base_model=base_model,
        r=spec.r,
        alpha=spec.alpha,
        dropout=spec.dropout,
        use_rslora=spec.use_rslora,
    )
