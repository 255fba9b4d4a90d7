"""Several models in one program and on several devices: the numbers of one after another."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recall_jax.engine import programs
from recall_jax.engine.forward import StreamedForward, models_side_by_side
from recall_jax.engine.memory import copied_bytes, hidden_bytes, working_bytes
from recall_jax.errors import InputError
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import state_tensors, tensor_shapes, to_flax
from recall_jax.models.forward import attention_windows, forward
from recall_jax.representations.pooling import masked_mean
from recall_jax.similarity.compare import Comparison, compare_unit

pytestmark = pytest.mark.eight_devices

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
ARCH = read_architecture(CONFIG)
K = 6
NAMES = [f"model {k}" for k in range(K)]
# two lengths, and a batch that is not full
ROWS = [list(np.random.default_rng(n).integers(0, 61, n)) for n in (3, 20, 9, 16, 30, 5, 12)]


def model_of(seed, scale=0.1):
    draws = np.random.default_rng(seed)
    return {
        name: jnp.asarray(draws.standard_normal(shape, np.float32) * scale + (len(shape) == 1))
        for name, shape in tensor_shapes(ARCH).items()
    }


MODELS = [model_of(seed) for seed in range(K)]


def walk(models, num_devices=1, models_at_once=1, batch_size=4):
    """Pooled means (K, U, n, E), and the forward that made them."""
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.local_devices()[:num_devices]
        patch.setattr(jax, "local_devices", lambda: devices)
        run = StreamedForward.prepare(
            ARCH,
            ROWS,
            batch_size=batch_size,
            dtype=jnp.float32,
            num_models=len(models),
            models_at_once=models_at_once,
        )
    states, pooled = (), []
    for unit in ARCH.units:
        states, means = run.advance(unit, run.place(unit, models), states, NAMES[: len(models)])
        chex.assert_shape(means, (len(models), len(ROWS), ARCH.hidden_size))
        pooled.append(means)
    return np.stack(pooled, axis=1), run


@pytest.fixture(scope="module")
def resident():
    """The same means by the forward of whole models, row by row."""
    length = max(map(len, ROWS))
    ids = np.array([row + [0] * (length - len(row)) for row in ROWS], np.int32)
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in ROWS], np.int32)
    run = jax.jit(
        lambda tree: forward(
            ARCH, tree, ids, mask, observe=lambda hidden: masked_mean(hidden, jnp.asarray(mask))
        )[0]
    )
    return np.stack([np.stack(run(to_flax(ARCH, model))) for model in MODELS])


@pytest.mark.parametrize(
    ("num_devices", "models_at_once", "mesh", "each"),
    [
        (1, 1, (1, 1), 1),
        (1, 2, (1, 1), 2),
        (1, 3, (1, 1), 3),
        (1, 4, (1, 1), 3),  # two equal groups, rather than one of four and one of two
        (2, 1, (2, 1), 1),
        (2, 3, (2, 1), 3),
        (8, 1, (2, 4), 1),
        (8, 3, (2, 4), 3),
    ],
)
def test_groups_and_devices_change_no_number(num_devices, models_at_once, mesh, each, resident):
    pooled, run = walk(MODELS, num_devices, models_at_once)
    assert (tuple(run.mesh.shape.values()), run.models_per_device) == (mesh, each)
    np.testing.assert_allclose(pooled, resident, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("num_devices", "models_at_once"), [(1, 1), (1, 3), (3, 1), (8, 1)])
def test_identical_models_have_identical_states(num_devices, models_at_once):
    pooled, _ = walk([MODELS[0]] * 3, num_devices, models_at_once)
    np.testing.assert_array_equal(pooled, np.broadcast_to(pooled[-1], pooled.shape))
    for unit in range(len(ARCH.units)):
        similarity, _ = compare_unit(jnp.asarray(pooled[:, unit]), Comparison())
        np.testing.assert_array_equal(similarity, np.ones(3, np.float32))


def test_models_of_several_dtypes_lie_side_by_side():
    kinds = [jnp.float32, jnp.float16, jnp.bfloat16]
    models = [
        {name: np.asarray(array, kind) for name, array in model.items()}
        for model, kind in zip(MODELS, kinds, strict=False)
    ]
    wide = [{name: array.astype(np.float32) for name, array in m.items()} for m in models]
    found, right = walk(models, num_devices=3, models_at_once=3)[0], walk(wide)[0]
    np.testing.assert_allclose(found, right, rtol=2e-5, atol=2e-5)


def test_one_program_serves_all_blocks_and_all_groups():
    before = programs.run_block._cache_size()
    _, run = walk(MODELS, models_at_once=2, batch_size=3)
    shapes = {batch.input_ids.shape for batch in run.batches.batches}
    assert len(shapes) == 2
    assert programs.run_block._cache_size() - before == len(shapes)


def test_a_device_gets_only_its_own_models_parameters():
    _, run = walk(MODELS, num_devices=8)
    name = state_tensors(ARCH, "layers.1")[1]
    ((placed,),) = run._spread([{name: model[name]} for model in MODELS[:2]])
    for shard in placed.addressable_shards:
        row = np.argwhere(run.mesh.devices == shard.device)[0, 0]
        np.testing.assert_array_equal(shard.data, MODELS[row][name])


def test_a_parameter_in_the_compute_dtype_is_used_where_it_lies():
    _, run = walk(MODELS[:1])
    name = state_tensors(ARCH, "layers.1")[1]
    ((used,),) = programs.in_dtype(run._spread([{name: MODELS[0][name]}]), run.dtype)
    assert used.unsafe_buffer_pointer() == MODELS[0][name].unsafe_buffer_pointer()


def test_the_faulty_one_of_a_group_is_named():
    faulty = MODELS[1] | {"model.norm.weight": MODELS[1]["model.norm.weight"].at[3].set(jnp.nan)}
    with pytest.raises(InputError, match=r"^model 1: tensor model\.norm\.weight holds NaN"):
        walk([MODELS[0], faulty, MODELS[2]], models_at_once=3)


@pytest.mark.parametrize(
    ("num_models", "num_devices", "num_rows", "expected"),
    [
        (3, 1, 8, 1),
        (3, 2, 8, 1),  # side by side, two would wait for the third
        (2, 2, 8, 2),  # as quick as half of the rows each, with half of the parameters
        (8, 4, 8, 4),
        (3, 8, 8, 1),
        (3, 8, 2, 3),  # few rows leave devices over
        (1, 8, 8, 1),
    ],
)
def test_the_layout_that_finishes_first(num_models, num_devices, num_rows, expected):
    assert models_side_by_side(num_models, num_devices, num_rows) == expected


@pytest.mark.optimised
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("widths", "rows", "tokens", "models_at_once"),
    [
        ({}, 8, 128, 1),
        ({}, 4, 16, 3),
        ({"intermediate_size": 1536}, 2, 512, 2),
        ({"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}, 1, 512, 1),
    ],
)
def test_what_a_block_works_with_is_bounded(widths, rows, tokens, models_at_once, dtype):
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}
    arch = read_architecture(CONFIG | sizes | widths)
    run = StreamedForward.prepare(arch, [[1] * tokens] * rows, batch_size=rows, dtype=dtype)
    mesh = jax.make_mesh((1, 1), ("models", "rows"), axis_types=run.mesh.axis_types)
    shapes, itemsize = tensor_shapes(arch), jnp.dtype(dtype).itemsize
    names = state_tensors(arch, "layers.0")
    parameters = [[jax.ShapeDtypeStruct(shapes[name], dtype) for name in names]] * models_at_once
    hidden = jax.ShapeDtypeStruct((models_at_once, rows, tokens, arch.hidden_size), dtype)
    ctx = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), run.contexts[0])
    window = attention_windows(arch)[0]
    compiled = programs.run_block.lower(arch, mesh, parameters, window, hidden, ctx).compile()
    taken = compiled.memory_analysis().temp_size_in_bytes
    bound = working_bytes(arch, rows, tokens, models_at_once)
    bound += copied_bytes(arch, models_at_once, itemsize, on_cpu=True)
    assert taken <= bound <= (1.4 if dtype == jnp.float32 else 1.75) * taken
    assert models_at_once * hidden_bytes(arch, run.batches, itemsize) == hidden.size * itemsize
