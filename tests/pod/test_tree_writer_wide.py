"""A tree of elements of eight bytes, which JAX has only where it is told so."""

import jax
import numpy as np
import pytest

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.checkpoint.orbax import load_orbax
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.engine.plan import in_forward_order
from recall_jax.engine.pod.tree_writer import TreeWriter
from recall_jax.models.config import read_architecture
from recall_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.eight_devices


def test_float64_stays_float64(toys, tmp_path):
    model = open_checkpoint(toys.llama[0])
    wide = np.dtype(np.float64)
    specs = {n: TensorSpec(wide, s.shape) for n, s in in_forward_order(model.specs).items()}
    arch, third = read_architecture(model.config), np.float64(1) / 3
    with TreeWriter(tmp_path, arch, specs, make_mesh({"fsdp": 2})) as writer:
        for name, spec in specs.items():
            writer.write_piece(name, np.full(np.prod(spec.shape), third))
    for leaf in jax.tree.leaves(load_orbax(tmp_path)):
        np.testing.assert_array_equal(leaf, np.full(leaf.shape, third), strict=True)
