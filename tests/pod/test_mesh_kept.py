"""A merge that is resumed keeps the mesh that was chosen, whatever would be chosen now."""

import json

import pytest
import yaml

from recall_jax.jobs import merge as job

pytestmark = pytest.mark.eight_devices


def test_auto_is_the_mesh_of_the_interrupted_merge(recall, toys, tmp_path, monkeypatch):
    recipe = {"merge_method": "average", "models": [{"model": model} for model in toys.llama]}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    words = ["merge", tmp_path / "recipe.yml", tmp_path / "out"]

    def stopped(*given):
        raise SystemExit(143)

    with monkeypatch.context() as patched:
        patched.setattr(job, "write_outcome", stopped)
        assert recall(*words, "--mesh", "data=2,fsdp=3").status == 143
    refused = recall(*words, "--mesh", "data=8", "--resume")
    assert refused.status == 2
    assert "mesh data=2,fsdp=3" in refused.err
    done = recall(*words, "--mesh", "auto", "--resume")
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "out" / "recall_report.json").read_text())
    assert report["memory"]["mesh"] == {"model": 1, "data": 2, "fsdp": 3, "tensor": 1}
    assert report["resumed_units"] == len(report["units"])
