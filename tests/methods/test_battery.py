"""One battery for every merge method of the registry, and for three written as a user would."""

import shutil

import jax
import numpy as np
import pytest
from deep_models import write_model
from entries import ENTRIES, SIZES, SUMS, assert_near, recipe_of, tensors, tolerance
from safetensors.numpy import load_file, save_file
from threaded import together
from toys import TIMED, tree

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.engine.pod.prepare import ON_MESH
from recall_jax.errors import InputError
from recall_jax.jobs import merge as job

pytestmark = pytest.mark.usefixtures("own_methods")

# Methods whose equation has an order of the models, and what it is.
ORDERED = {
    "recall": "all are compared with the newest",
    "recall_distill": "begins with RECALL's weights",
    "dare_linear": "what is drawn hangs on a model's place",
    "dare_ties": "what is drawn hangs on a model's place",
    "opcm": "models are added one after the other",
    "norm_weighted": "the newest model selects the samples",
}
MESH = "data=2,fsdp=2,tensor=2"


@pytest.fixture(scope="module")
def merged(models, rows, tmp_path_factory):
    """The folder of a method's merge of the three models on one device, made once."""
    folder = tmp_path_factory.mktemp("merged")

    def merge(name):
        if not (folder / name).exists():
            job.merge(recipe_of(name, models[1:], rows, models[0]), folder / name)
        return folder / name

    return merge


@pytest.mark.parametrize("name", ENTRIES)
def test_identical_models_merge_to_themselves_bit_for_bit(name, models, rows, tmp_path):
    base = shutil.copytree(models[1], tmp_path / "base")
    job.merge(recipe_of(name, [models[1]] * 3, rows, str(base)), tmp_path / "out")
    found, expected = tensors(tmp_path / "out"), tensors(models[1])
    for tensor, right in expected.items():
        assert found[tensor].tobytes() == right.tobytes(), tensor


@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in ORDERED])
def test_the_order_of_the_models_changes_nothing(name, models, rows, merged, tmp_path):
    turned = [models[2], models[1], models[3]]  # the newest's samples and tokenizer stay
    job.merge(recipe_of(name, turned, rows, models[0]), tmp_path / "out")
    assert_near(tmp_path / "out", merged(name), max(SUMS, tolerance(ENTRIES[name].needs)))


def test_methods_with_an_order_are_in_the_registry():
    assert set(ORDERED) <= set(ENTRIES)


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_dtypes_shapes_and_finiteness_are_kept(name, dtype, models, rows, merged, tmp_path):
    out = merged(name)
    if dtype is not None:
        out = tmp_path / "out"
        job.merge(recipe_of(name, models[1:], rows, models[0], out_dtype=dtype), out)
    specs, newest = open_checkpoint(str(out)).specs, open_checkpoint(models[-1]).specs
    assert {key: spec.shape for key, spec in specs.items()} == {
        key: spec.shape for key, spec in newest.items()
    }
    assert {spec.dtype.name for spec in specs.values()} == {dtype or "float32"}
    assert all(np.isfinite(array.astype(np.float32)).all() for array in tensors(out).values())


@pytest.mark.parametrize("name", ENTRIES)
def test_a_tensor_that_is_not_finite_is_named(name, models, rows, toys, tmp_path):
    broken = write_model(toys.llama[0], tmp_path / "broken", np.float32, seed=9, **SIZES)
    tensor, file = "model.layers.1.mlp.up_proj.weight", broken / "model.safetensors"
    arrays = load_file(file)
    arrays[tensor][5, 7] = np.nan
    save_file(arrays, file)
    with pytest.raises(InputError, match=tensor):
        job.merge(recipe_of(name, [models[1], str(broken)], rows, models[0]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.eight_devices
@pytest.mark.parametrize("name", ENTRIES)
def test_a_mesh_gives_what_one_device_gives(name, models, rows, merged, tmp_path):
    recipe = recipe_of(name, models[1:], rows, models[0])
    options = job.MergeOptions(mesh=MESH)
    needs = ENTRIES[name].needs
    assert jax.device_count() == 8
    if not ON_MESH.meets(needs):
        with pytest.raises(InputError, match=f"{name} runs on one host"):
            job.merge(recipe, tmp_path / "out", options=options)
        return
    job.merge(recipe, tmp_path / "out", options=options)
    assert_near(tmp_path / "out", merged(name), tolerance(needs))


@pytest.mark.parametrize("name", ENTRIES)
def test_processes_give_what_one_gives(name, models, rows, merged, tmp_path):
    recipe, needs = recipe_of(name, models[1:], rows, models[0]), ENTRIES[name].needs

    def run(processes):
        return job.merge(
            recipe, tmp_path / "out", options=job.MergeOptions(mesh="data=1", processes=processes)
        )

    if not ON_MESH.meets(needs):
        with pytest.raises(InputError, match=f"{name} runs on one host"):
            together(2, run)
        return
    together(2, run)
    assert_near(tmp_path / "out", merged(name), tolerance(needs))


@pytest.mark.parametrize("name", ENTRIES)
def test_an_interrupted_merge_goes_on_to_the_same_bytes(name, models, rows, merged, tmp_path):
    recipe, out = recipe_of(name, models[1:], rows, models[0]), tmp_path / "out"

    def interrupt(doing, done, total, **moved):
        if doing == "layers.1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.merge(recipe, out, progress=interrupt)
    report = job.merge(recipe, out, options=job.MergeOptions(resume=True))
    assert report["resumed_units"] in (1, 2)  # what waits for the writer may or may not be written
    one, other = (
        {key: content for key, content in tree(folder).items() if key not in TIMED}
        for folder in (out, merged(name))
    )
    assert one == other
