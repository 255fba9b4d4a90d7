"""Shapes by arithmetic: those of the modules that a model is made of."""

from dataclasses import replace

import jax
import pytest
from flax.traverse_util import flatten_dict

from recall_jax.errors import InputError
from recall_jax.models.architecture import LAYERS
from recall_jax.models.config import read_architecture
from recall_jax.models.forward import init_params
from recall_jax.models.shapes import check_shapes, group_shapes

ARCH = read_architecture(
    {
        "model_type": "llama",
        "vocab_size": 11,
        "hidden_size": 6,
        "intermediate_size": 7,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": True},
        {"output_bias": True, "mlp_bias": True},
        {"qk_norm": True},
        {"tie_word_embeddings": True, "num_key_value_heads": 3},
    ],
    ids=str,
)
def test_they_are_those_of_the_modules(changes):
    arch = replace(ARCH, **changes)
    made = jax.eval_shape(lambda: init_params(arch, jax.random.key(0)))
    expected = {}
    for group, params in made.items():
        for path, leaf in flatten_dict(params, sep="/").items():
            shape = leaf.shape[1:] if group == LAYERS else leaf.shape  # the layers are stacked
            on_disk = shape[::-1] if path.endswith("kernel") else shape
            expected.setdefault(group, {})[path] = on_disk
    assert group_shapes(arch) == expected


def test_only_what_has_a_name_of_the_family_is_held_to_its_shape():
    shapes = {f"model.layers.{index}.mlp.up_proj.weight": (7, 6) for index in range(3)}
    shapes["lm_head.weight"] = (11, 6)
    check_shapes(ARCH, shapes | {"score.weight": (1, 1), "layers.0.mlp.up_proj.weight": (2,)}, "a")
    wrong = {"model.layers.1.self_attn.k_proj.weight": (6, 4), "model.norm.weight": (7,)}
    with pytest.raises(
        InputError, match=r"a: .*k_proj.weight \[6, 4\] instead of \[4, 6\], .*\[6\]"
    ):
        check_shapes(ARCH, shapes | wrong, "a")
    with pytest.raises(InputError, match=r"a: .* 4 layers instead of 3"):
        check_shapes(ARCH, shapes | {"model.layers.3.mlp.up_proj.weight": (7, 6)}, "a")
