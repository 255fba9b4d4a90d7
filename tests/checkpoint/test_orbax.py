"""Trees through Orbax: every dtype bit for bit, wherever the arrays lived."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from toys import environment

from recall_jax.checkpoint.orbax import is_orbax, load_orbax, save_orbax
from recall_jax.errors import InputError


def random_array(dtype: object, shape: tuple[int, ...]) -> np.ndarray:
    dtype = np.dtype(dtype)
    data = np.random.default_rng(0).bytes(int(np.prod(shape)) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape)


TREE = {
    "embed": {"embedding": random_array(ml_dtypes.bfloat16, (5, 4))},
    "layers": {
        "kernel": random_array(np.float16, (2, 4, 4)),
        "norm.scale": random_array(np.float32, (2, 4)),
        "count": np.arange(3),
    },
    "head": {"scale": random_array(np.float64, ())},
}


def assert_same(read: object, expected: object) -> None:
    assert jax.tree.structure(read) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(read), jax.tree.leaves(expected), strict=True):
        assert type(ours) is np.ndarray
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.tobytes() == np.asarray(theirs).tobytes()


def test_numpy_trees_come_back_bit_for_bit(tmp_path):
    assert not is_orbax(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    save_orbax(tmp_path, TREE)
    assert is_orbax(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tree", "config.json"}
    assert_same(load_orbax(tmp_path), TREE)


@pytest.mark.optimised  # in haste a signalling NaN of bfloat16 is made quiet on its way
def test_arrays_sharded_over_devices_come_back_whole(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    array = jnp.asarray(random_array(ml_dtypes.bfloat16, (16, 3)))
    tree = {
        "sharded": jax.device_put(array, NamedSharding(mesh, PartitionSpec("x"))),
        "replicated": jax.device_put(array, NamedSharding(mesh, PartitionSpec())),
        "single": array,
    }
    save_orbax(tmp_path, tree)
    assert_same(load_orbax(tmp_path), tree)


def test_relative_folders_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_orbax(Path("."), TREE)
    assert_same(load_orbax(Path(".")), TREE)


def test_a_folder_without_a_tree_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="is no Orbax folder"):
            load_orbax(folder)
    (tmp_path / "tree").mkdir()
    with pytest.raises(InputError, match="is no Orbax folder"):
        load_orbax(tmp_path)


def test_a_damaged_tree_is_refused_in_one_line(tmp_path):
    save_orbax(tmp_path, TREE)
    (tmp_path / "tree" / "state" / "_METADATA").unlink()
    with pytest.raises(InputError, match=r"tree is damaged \(\w+\)") as caught:
        load_orbax(tmp_path)
    assert "\n" not in str(caught.value)


def test_orbax_adds_nothing_to_the_line_on_a_damaged_tree(tmp_path, cache):
    save_orbax(tmp_path, TREE)
    for file in (tmp_path / "tree" / "state" / "d").iterdir():
        os.truncate(file, 50)
    command = [Path(sys.executable).with_name("recall"), "inspect", tmp_path]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(cache), timeout=60
    )
    assert done.returncode == 2 and "is damaged" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_array_without_elements_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"\['a'\]\['b'\] is empty"):
        save_orbax(tmp_path, {"a": {"b": np.zeros((0, 3), np.float32)}})
    assert list(tmp_path.iterdir()) == []
