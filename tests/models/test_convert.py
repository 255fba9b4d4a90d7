"""Names, shapes and bits between Hugging Face tensors and the Flax tree."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.checkpoint.units import LM_HEAD, unit_of_tensor
from recall_jax.errors import InputError
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import (
    check_tensors,
    from_flax,
    tensor_shapes,
    to_flax,
    unit_params,
    unit_tensors,
)
from recall_jax.models.forward import init_params

TINY = {
    "vocab_size": 11,
    "hidden_size": 6,
    "intermediate_size": 7,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 4,
}
ARCHS = {
    "llama": read_architecture(
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True, **TINY}
    ),
    "mistral": read_architecture({"model_type": "mistral", "tie_word_embeddings": True, **TINY}),
    "qwen2": read_architecture({"model_type": "qwen2", **TINY}),
    "qwen3": read_architecture({"model_type": "qwen3", "tie_word_embeddings": True, **TINY}),
}
LLAMA, TIED = ARCHS["llama"], ARCHS["qwen3"]

# Signalling and quiet NaNs of both signs with payloads, infinities, -0.0, subnormals.
ODD_BITS = [0x7F81, 0xFF81, 0x7FC1, 0xFFFF, 0x7F80, 0xFF80, 0x8000, 0x0000, 0x0001, 0x807F]


def tensors_of(arch, bits, dtype):
    """Tensors of `arch` filled with the repeated bit patterns, shifted from tensor to tensor."""
    tensors = {}
    for shift, (name, shape) in enumerate(tensor_shapes(arch).items()):
        count = np.prod(shape) * np.dtype(dtype).itemsize // 2
        pattern = np.roll(np.array(bits, np.uint16), shift)
        tensors[name] = np.resize(pattern, count).view(dtype).reshape(shape)
    return tensors


def same_bytes(found, expected):
    assert list(found) == list(expected)
    for name, array in found.items():
        assert isinstance(array, np.ndarray) and array.flags.c_contiguous
        assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape)
        assert array.tobytes() == expected[name].tobytes(), name


@given(
    bits=st.lists(st.sampled_from(ODD_BITS) | st.integers(0, 2**16 - 1), min_size=1, max_size=97),
    family=st.sampled_from(sorted(ARCHS)),
    dtype=st.sampled_from([ml_dtypes.bfloat16, np.float16, np.float32, np.float64]),
)
def test_to_flax_and_back_keeps_every_bit(bits, family, dtype):
    tensors = tensors_of(ARCHS[family], bits, dtype)
    tree = to_flax(ARCHS[family], tensors)
    same_bytes(from_flax(ARCHS[family], tree), tensors)


def test_each_tensor_keeps_its_own_dtype():
    tensors = tensors_of(LLAMA, ODD_BITS, ml_dtypes.bfloat16)
    tensors |= {name: tensors[name].astype(np.float32) for name in tensors if "norm" in name}
    same_bytes(from_flax(LLAMA, to_flax(LLAMA, tensors)), tensors)


def test_a_tree_on_the_device_converts_back():
    tree = init_params(LLAMA, jax.random.key(0, impl="rbg"), jnp.bfloat16)
    tensors = from_flax(LLAMA, tree)
    assert {name: array.shape for name, array in tensors.items()} == tensor_shapes(LLAMA)
    assert all(array.flags.c_contiguous for array in tensors.values())
    kernel = np.asarray(tree["layers"]["mlp"]["up_proj"]["kernel"])
    assert kernel.shape == (2, 6, 7)
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.up_proj.weight"], kernel[1].T)


def test_fresh_parameters_are_laid_out_as_converted_ones():
    arch = ARCHS["qwen2"]
    fresh = init_params(arch, jax.random.key(0, impl="rbg"), jnp.bfloat16)
    converted = to_flax(arch, tensors_of(arch, [0], ml_dtypes.bfloat16))
    described = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), t) for t in (fresh, converted)]
    assert described[0] == described[1]

    wide = read_architecture({"model_type": "qwen2", **TINY, "hidden_size": 256})
    tree = init_params(wide, jax.random.key(0, impl="rbg"))
    assert 0.019 < float(tree["embed"]["embedding"].std()) < 0.021
    kernels = tree["layers"]["mlp"]["gate_proj"]["kernel"]
    assert 0.019 < float(kernels.std()) < 0.021
    assert not np.array_equal(kernels[0], kernels[1])
    assert (tree["layers"]["input_layernorm"]["scale"] == 1).all()
    assert (tree["layers"]["self_attn"]["q_proj"]["bias"] == 0).all()


@pytest.mark.parametrize("family", ARCHS)
def test_the_units_partition_the_tensors_in_order(family):
    arch = ARCHS[family]
    names = [name for unit in arch.units for name in unit_tensors(arch, unit)]
    assert names == list(tensor_shapes(arch)) and len(set(names)) == len(names)
    for unit in arch.units:
        assert {unit_of_tensor(name) for name in unit_tensors(arch, unit)} == {unit}


def test_a_tied_head_has_only_the_norm():
    assert unit_tensors(TIED, "head") == ("model.norm.weight",)
    assert unit_tensors(LLAMA, "head") == ("model.norm.weight", "lm_head.weight")


def test_unit_params_traces_and_agrees_with_the_stacked_tree():
    tensors = tensors_of(LLAMA, range(97), np.float32)
    stacked = to_flax(LLAMA, tensors)["layers"]
    convert = jax.jit(lambda named: unit_params(LLAMA, "layers.1", named))
    params = convert({name: tensors[name] for name in unit_tensors(LLAMA, "layers.1")})
    jax.tree.map(lambda leaf, stack: np.testing.assert_array_equal(leaf, stack[1]), params, stacked)
    assert params["self_attn"]["o_proj"]["kernel"].shape == (12, 6)


def test_complete_tensors_pass_with_or_without_what_is_never_read():
    check_tensors(LLAMA, tensor_shapes(LLAMA), "a")
    check_tensors(TIED, tensor_shapes(TIED), "a")
    check_tensors(TIED, tensor_shapes(TIED) | {"lm_head.weight": (11, 6)}, "a")


@pytest.mark.parametrize(
    ("arch", "changes", "said"),
    [
        (LLAMA, {"model.norm.weight": None}, ["missing model.norm.weight"]),
        (LLAMA, {"lm_head.weight": None}, ["missing lm_head.weight"]),
        (LLAMA, {"model.layers.2.mlp.up_proj.weight": (7, 6)}, ["unexpected model.layers.2.mlp"]),
        (LLAMA, {"model.norm.weight": (5,)}, ["model.norm.weight (5,) instead of (6,)"]),
        (TIED, {"lm_head.weight": (12, 6)}, ["lm_head.weight (12, 6) instead of (11, 6)"]),
        (
            LLAMA,
            {"model.norm.weight": None, "norm.weight": (6,)},
            ["missing model.norm.weight", "unexpected norm.weight"],
        ),
    ],
)
def test_other_tensors_are_refused_in_one_line_with_both_sides(arch, changes, said):
    shapes = tensor_shapes(arch) | changes
    shapes = {name: shape for name, shape in shapes.items() if shape is not None}
    with pytest.raises(InputError) as error:
        check_tensors(arch, shapes, "some/folder")
    message = str(error.value)
    assert message.startswith("some/folder: ") and "\n" not in message and len(message) < 400
    for words in said:
        assert words in message


def test_a_base_model_saved_without_its_head_is_told_so():
    untied = replace(TIED, tie_word_embeddings=False)
    shapes = {name: shape for name, shape in tensor_shapes(untied).items() if name != LM_HEAD}
    with pytest.raises(InputError, match=r"missing lm_head\.weight; .* with AutoModelForCausalLM"):
        check_tensors(untied, shapes, "folder")
