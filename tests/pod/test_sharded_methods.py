"""A method whose models run through what has been merged so far: over a mesh as on one host."""

import numpy as np
import pytest
from toys import write_rows

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.jobs import merge as job
from recall_jax.recipes.recipe import make_recipe

pytestmark = pytest.mark.eight_devices

TEXTS = ["abcdef", "hXYZ01 a", "f0f1", "X", "gh a a h b", "01010", "ZYX hg"]


def rows_of(folder, k):
    return str(write_rows(folder / f"{k}.jsonl", [text * (k + 1) for text in TEXTS]))


def differences(one, other):
    """Of each tensor, the largest difference beside its largest element."""
    models = open_checkpoint(one), open_checkpoint(other)
    assert list(models[0].specs) == list(models[1].specs)
    for name in models[0].specs:
        right, found = (model.read(name).astype(np.float32) for model in models)
        yield np.abs(found - right).max() / np.abs(right).max()


@pytest.mark.soak
def test_regmean_through_what_is_merged_runs_over_a_mesh_as_on_one_host(toys, tmp_path):
    entries = [{"model": model, "data": rows_of(tmp_path, k)} for k, model in enumerate(toys.llama)]
    values = {"merge_method": "regmean_plusplus", "models": entries, "samples": {"count": 4}}
    recipe = make_recipe(values, where="test")
    host, mesh = tmp_path / "host", tmp_path / "mesh"
    job.merge(recipe, host)
    report = job.merge(recipe, mesh, options=job.MergeOptions(mesh="data=2,fsdp=2,tensor=2"))
    assert report["memory"]["mesh"] == {"model": 1, "data": 2, "fsdp": 2, "tensor": 2}
    assert max(differences(host, mesh)) < 1e-5
