"""`--plugin`: a merge method of the user's own goes through the same door as ours."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.jobs import merge as job
from recall_jax.jobs.verify import verify
from recall_jax.methods.registry import METHODS
from recall_jax.recipes.plugins import load_plugins
from recall_jax.recipes.recipe import read_recipe

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "own_method.py"


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """The registry and the modules as they were, after each test."""
    methods, modules = dict(METHODS), set(sys.modules)
    yield
    METHODS.clear()
    METHODS.update(methods)
    for name in set(sys.modules) - modules:
        if name.startswith("recall_jax_plugin:"):
            del sys.modules[name]


@pytest.fixture
def recipe(toys, tmp_path):
    """The three models by the method of the example, with a strength that rises with depth."""
    path = tmp_path / "recipe.json"
    models = [{"model": model} for model in toys.qwen2]
    keys = {"merge_method": "median", "models": models, "parameters": {"strength": 0.5}}
    path.write_text(json.dumps(keys))
    return path


def test_the_example_merges_by_its_equation(recall, recipe, toys, tmp_path):
    done = recall("merge", recipe, tmp_path / "out", "--plugin", EXAMPLE)
    assert done.status == 0, done.err
    verify(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "recall_report.json").read_text())
    assert report["method"] == "median" and report["plugins"] == [str(EXAMPLE)]
    merged, *models = (open_checkpoint(str(path)) for path in (tmp_path / "out", *toys.qwen2))
    for name in merged.specs:
        arrays = [model.read(name).astype(np.float32) for model in models]
        newest = arrays[-1]
        expected = newest + np.float32(0.5) * (np.median(arrays, axis=0) - newest)
        found = merged.read(name)
        np.testing.assert_array_equal(found, expected.astype(found.dtype), err_msg=name)
        assert not np.array_equal(found, models[-1].read(name)), name


def test_the_example_is_as_short_as_it_is_said_to_be():
    code = EXAMPLE.read_text().split('"""', 2)[2]
    assert len(code.strip().splitlines()) <= 30


def test_without_the_plugin_the_method_is_unknown(recall, recipe, tmp_path):
    done = recall("merge", recipe, tmp_path / "out")
    assert done.status == 2 and "merge_method" in done.err and "median" in done.err


def test_a_plan_knows_what_the_method_needs(recall, recipe):
    done = recall("plan", recipe, "--plugin", EXAMPLE, "--devices", "v5e-8")
    assert done.status == 0, done.err
    assert "median of 3 models" in done.out


@pytest.mark.parametrize("command", ["merge", "plan", "continual"])
def test_the_help_says_that_a_plugin_runs_code(recall, command):
    words = recall(command, "--help").out.replace("│", " ").split()
    assert "runs" in words and "--plugin" in words


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (None, "is not a Python file"),
        ("def broken(:\n", "SyntaxError"),
        ("import sys; sys.exit(3)\n", "SystemExit"),
        ("import no_such_module_here\n", "no_such_module_here"),
        ("x = 1\n", "adds no method"),
        ("METHODS = {}\n", "adds no method"),
        ("METHODS = {'median': 1}\n", "not a name with a"),
        (
            "from recall_jax.methods.average import METHOD\nMETHODS = {'ties': METHOD}\n",
            "already a method ties",
        ),
    ],
)
def test_a_file_that_is_no_plugin_is_refused_in_one_line(recall, recipe, tmp_path, code, said):
    plugin = tmp_path / "plugin.py"
    if code is not None:
        plugin.write_text(code)
    known = dict(METHODS)
    done = recall("merge", recipe, tmp_path / "out", "--plugin", plugin)
    assert done.status == 2
    assert len(done.err.strip().splitlines()) == 1
    assert str(plugin) in done.err and said in done.err
    assert known == METHODS and not (tmp_path / "out").exists()


def test_a_merge_goes_on_only_with_the_same_plugin(recall, recipe, tmp_path):
    plugin, out = tmp_path / "method.py", tmp_path / "out"
    shutil.copy(EXAMPLE, plugin)
    load_plugins([plugin])

    def interrupt(unit, done, total, **moved):
        if unit == "head":
            raise KeyboardInterrupt

    options = job.MergeOptions(inputs=[recipe], plugins=[plugin])
    with pytest.raises(KeyboardInterrupt):
        job.merge(read_recipe(recipe), out, options=options, progress=interrupt)
    original = plugin.read_text()
    plugin.write_text(original + "# changed\n")
    refused = recall("merge", recipe, out, "--plugin", plugin, "--resume")
    assert refused.status == 2 and f"{plugin} is not what it was" in refused.err
    plugin.write_text(original)
    done = recall("merge", recipe, out, "--plugin", plugin, "--resume")
    assert done.status == 0, done.err
    assert json.loads((out / "recall_report.json").read_text())["resumed_units"] > 0
