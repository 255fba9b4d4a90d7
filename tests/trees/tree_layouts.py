"""One small language model in three frameworks' layouts, and what is needed to merge them.

The layouts are built by Flax itself: a Linen module with one entry for each layer, the same scanned
along axis 1 under the names that MaxText uses, and an NNX module.
"""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

L, E, H, V = 3, 8, 8, 23
UNITS = ["embed", *(f"layers.{i}" for i in range(L)), "head"]


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.Dense(H, use_bias=False, name="wi")(x)
        return nn.Dense(E, use_bias=False, name="wo")(jnp.tanh(hidden))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + Mlp(name="mlp")(nn.RMSNorm(name="norm")(x))
        return x, x


class Unscanned(nn.Module):
    """One entry for each layer, as Linen names them."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(V, E, name="embedder")(ids)
        units = [x]
        for i in range(L):
            x, _ = Block(name=f"layers_{i}")(x)
            units.append(x)
        x = nn.RMSNorm(name="final_norm")(x)
        nn.Dense(V, use_bias=False, name="lm_head")(x)
        return [*units, x]


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Block, variable_axes={"params": 1}, split_rngs={"params": True}, length=L)
        x, units = layers(name="layers")(x, None)
        x = nn.RMSNorm(name="decoder_norm")(x)
        nn.Dense(V, use_bias=False, name="logits_dense")(x)
        return units, x


class Scanned(nn.Module):
    """MaxText's names, layers scanned along axis 1."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(V, E, name="token_embedder")(ids)
        units, last = Decoder(name="decoder")(x)
        return [x, *units, last]


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.wi = nnx.Linear(E, H, use_bias=False, rngs=rngs)
        self.wo = nnx.Linear(H, E, use_bias=False, rngs=rngs)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(E, rngs=rngs)
        self.mlp = NnxMlp(rngs)

    def __call__(self, x):
        return x + self.mlp.wo(jnp.tanh(self.mlp.wi(self.norm(x))))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embedder = nnx.Embed(V, E, rngs=rngs)
        self.layers = nnx.List([NnxBlock(rngs) for _ in range(L)])
        self.final_norm = nnx.RMSNorm(E, rngs=rngs)
        self.lm_head = nnx.Linear(E, V, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        units = [self.embedder(ids)]
        for layer in self.layers:
            units.append(layer(units[-1]))
        return [*units, self.final_norm(units[-1])]


def apply_linen(params, batch):
    return Unscanned().apply(params, batch["input_ids"])


def apply_float32(params, batch):
    """As models stored in bfloat16 may be run."""
    return apply_linen(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), batch)


def apply_maxtext(params, batch):
    return Scanned().apply(params, batch["input_ids"])


def apply_nnx(params, batch):
    graph, state = nnx.split(nnx.eval_shape(lambda: Nnx(nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, nnx.restore_int_paths(params))
    return nnx.merge(graph, state)(batch["input_ids"])


# What each layout needs in a recipe.
TREE = {
    "linen": {"embed": "params/embedder/**", "layers": "params/layers_{i}/**"},
    "maxtext": {
        "root": "params",
        "embed": "params/token_embedder/**",
        "layers": "params/decoder/layers/**",
        "axis": 1,
    },
    "nnx": {"embed": "embedder/**", "layers": "layers/{i}/**"},
}
FORWARD = {name: f"tree_layouts:apply_{name}" for name in TREE}


def weights(seed: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """The model's weights by plain names; models of different seeds resemble each other."""
    shared, own = np.random.default_rng(99), np.random.default_rng(seed)
    shapes = {"embed": (V, E), "norm": (E,), "head": (E, V)}
    for i in range(L):
        shapes |= {f"{i}.wi": (E, H), f"{i}.wo": (H, E), f"{i}.norm": (E,)}
    return {
        name: (shared.normal(size=shape) / 2 + own.normal(size=shape) * 0.2).astype(dtype)
        for name, shape in shapes.items()
    }


def linen(w: dict[str, np.ndarray]) -> Any:
    return {
        "params": {
            "embedder": {"embedding": w["embed"]},
            **{
                f"layers_{i}": {
                    "mlp": {"wi": {"kernel": w[f"{i}.wi"]}, "wo": {"kernel": w[f"{i}.wo"]}},
                    "norm": {"scale": w[f"{i}.norm"]},
                }
                for i in range(L)
            },
            "final_norm": {"scale": w["norm"]},
            "lm_head": {"kernel": w["head"]},
        }
    }


def maxtext(w: dict[str, np.ndarray]) -> Any:
    """A whole train state: step and moments beside the parameters."""

    def stacked(name: str) -> np.ndarray:
        return np.stack([w[f"{i}.{name}"] for i in range(L)], axis=1)

    params = {
        "params": {
            "token_embedder": {"embedding": w["embed"]},
            "decoder": {
                "layers": {
                    "mlp": {"wi": {"kernel": stacked("wi")}, "wo": {"kernel": stacked("wo")}},
                    "norm": {"scale": stacked("norm")},
                },
                "decoder_norm": {"scale": w["norm"]},
                "logits_dense": {"kernel": w["head"]},
            },
        }
    }
    moments = jax.tree.map(lambda leaf: leaf * 0 + 7, params)
    return {"params": params, "opt_state": {"mu": moments}, "step": np.asarray(41, np.int32)}


def nnx_state(w: dict[str, np.ndarray]) -> Any:
    model = Nnx(nnx.Rngs(0))
    state = nnx.state(model)
    pure = {
        "embedder": {"embedding": w["embed"]},
        "layers": {
            i: {
                "mlp": {"wi": {"kernel": w[f"{i}.wi"]}, "wo": {"kernel": w[f"{i}.wo"]}},
                "norm": {"scale": w[f"{i}.norm"]},
            }
            for i in range(L)
        },
        "final_norm": {"scale": w["norm"]},
        "lm_head": {"kernel": w["head"]},
    }
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, pure))
    return state


BUILD = {"linen": linen, "maxtext": maxtext, "nnx": nnx_state}


def plain(layout: str, tree: Any) -> dict[str, np.ndarray]:
    """The weights of a loaded tree by plain names again."""
    if layout == "maxtext":
        decoder = tree["params"]["params"]["decoder"]
        layers = decoder["layers"]
        out = {
            "embed": tree["params"]["params"]["token_embedder"]["embedding"],
            "norm": decoder["decoder_norm"]["scale"],
            "head": decoder["logits_dense"]["kernel"],
        }
        for i in range(L):
            out |= {
                f"{i}.wi": layers["mlp"]["wi"]["kernel"][:, i],
                f"{i}.wo": layers["mlp"]["wo"]["kernel"][:, i],
                f"{i}.norm": layers["norm"]["scale"][:, i],
            }
    else:
        boxed = layout == "nnx"
        top = tree if boxed else tree["params"]
        leaf = (lambda box: box["value"]) if boxed else (lambda box: box)
        out = {
            "embed": leaf(top["embedder"]["embedding"]),
            "norm": leaf(top["final_norm"]["scale"]),
            "head": leaf(top["lm_head"]["kernel"]),
        }
        for i in range(L):
            layer = top["layers"][str(i)] if boxed else top[f"layers_{i}"]
            out |= {
                f"{i}.wi": leaf(layer["mlp"]["wi"]["kernel"]),
                f"{i}.wo": leaf(layer["mlp"]["wo"]["kernel"]),
                f"{i}.norm": leaf(layer["norm"]["scale"]),
            }
    return {name: np.asarray(array) for name, array in out.items()}


def save_models(folder: Path, layout: str, count: int = 3, dtype: Any = np.float32) -> list[str]:
    """Models of seeds 0, 1, … as Orbax checkpoints of a layout."""
    names = []
    for seed in range(count):
        path = folder / f"{layout}{seed}"
        ocp.save(path, BUILD[layout](weights(seed, dtype)))
        names.append(str(path))
    return names
