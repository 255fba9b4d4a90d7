"""`--ignore-config` wherever a message advises it, and attributes that need no such word."""

import json

import pytest
import yaml
from toys import copy_model

from recall_jax.errors import InputError
from recall_jax.models.config import read_architecture


@pytest.fixture(scope="module")
def place(toys, tmp_path_factory):
    """Two models with an attribute that nobody knows, a task, and recipes of each kind."""
    folder = tmp_path_factory.mktemp("odd")
    models = [
        copy_model(source, folder / f"model-{k}", mystery=3, eos_token_id=1)
        for k, source in enumerate(toys.llama)
    ]
    rows = folder / "data" / "letters" / "rows.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text('{"text": "abc abc"}\n{"text": "cab bac abb"}\n' * 3)
    task = {
        "task": "letters",
        "source": {"splits": {"test": [{"files": "rows.jsonl"}]}},
        "prompt": "{{ text }}",
        "scoring": {"by": "perplexity"},
    }
    recipe = {
        "merge_method": "recall",
        "models": [{"model": str(model)} for model in models],
        "samples": {"data": toys.data, "count": 2, "max_tokens": 8},
    }
    asked = {"batch_size": 6, "data_root": str(folder / "data")}
    ablation = recipe | {
        "tasks": [str(folder / "letters.yml")],
        "evaluate": asked,
        "ablate": {"temperature": [1.0]},
    }
    protocol = {
        "base_model": str(models[0]),
        "tasks": [{"name": "letters", "data": str(rows), "task": str(folder / "letters.yml")}],
        "strategies": {"twice": {"merge": {"merge_method": "average", "with_base": True}}},
        "finetune": {"max_tokens": 8, "steps": 2, "batch_size": 2},
        "evaluate": asked | {"stages": "last"},
    }
    files = {"letters": task, "merge": recipe, "ablate": ablation, "continual": protocol}
    for name, values in files.items():
        (folder / f"{name}.yml").write_text(yaml.safe_dump(values))
    return folder


COMMANDS = {
    "quick": "quick {place}/model-0 {place}/model-1 --data {data} --count 2 --out out",
    "plan": "plan {place}/merge.yml --devices cpu-8",
    "convert": "convert {place}/model-0 out --to npz",
    "select": "select {place}/model-0 --data {data} --count 2 --out out",
    "extract": "extract {place}/model-0 --typical {place}/data/letters/rows.jsonl --out out",
    "similarity": "similarity {place}/model-0 {place}/model-1 --data {data} --pool 4",
    "evaluate": "evaluate {place}/model-0 --tasks {place}/letters.yml --data-root {place}/data",
    "finetune": "finetune {place}/model-0 --data {data} --max-tokens 8 --steps 2 --out out",
    "ablate": "ablate {place}/ablate.yml --out out",
    "continual": "continual {place}/continual.yml --out out",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_advised_is_taken(command, place, toys, recall, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = COMMANDS[command].format(place=place, data=toys.data).split()
    done = recall(*line)
    assert done.status == 2 and done.err.count("\n") == 1, done.err
    assert "pass --ignore-config mystery" in done.err and not (tmp_path / "out").exists()
    done = recall(*line, "--ignore-config", "mystery")
    assert done.status == 0, done.err
    assert "mystery" not in done.err


def test_commands_that_look_at_a_model_take_it_too(place, recall):
    for command in ("inspect", "verify"):
        done = recall(command, place / "model-0")
        assert done.status == 0 and "--ignore-config mystery" in " ".join(done.out.split())
        done = recall(command, place / "model-0", "--ignore-config", "mystery")
        assert done.status == 0 and "mystery" not in done.out


def test_a_recipe_may_say_it(place, recall, tmp_path):
    values = yaml.safe_load((place / "continual.yml").read_text())
    path = tmp_path / "own.yml"
    path.write_text(yaml.safe_dump(values | {"ignore_config": ["other"]}))
    done = recall("continual", path, "--out", tmp_path / "out")
    assert done.status == 2 and "mystery" in done.err
    path.write_text(yaml.safe_dump(values | {"ignore_config": ["mystery"]}))
    assert recall("continual", path, "--out", tmp_path / "out").status == 0
    record = json.loads((tmp_path / "out" / "continual.json").read_text())
    assert record["warnings"] == []


@pytest.mark.parametrize("name", ["mystery", "layer_types", "sliding_window", "kv_lora_rank"])
def test_null_says_nothing(name):
    plain = {"model_type": "llama"}
    assert read_architecture(plain | {name: None}) == read_architecture(plain)
    scaled = plain | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    nulls = {"rope_scaling": {**scaled["rope_scaling"], name: None}}
    assert read_architecture(scaled | nulls) == read_architecture(scaled)


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [("expert_count", 8, 4), ("gate", "silu", "gelu"), ("skips", [1, 2], [1])],
)
def test_what_a_class_has_anyway_says_nothing(name, value, other, monkeypatch):
    """An attribute that a later transformers gives to a family that is read here."""
    from transformers import LlamaConfig

    monkeypatch.setattr(LlamaConfig, "to_dict", lambda self: {name: value})
    plain = {"model_type": "llama"}
    assert read_architecture(plain | {name: value}) == read_architecture(plain)
    with pytest.raises(InputError, match=f"--ignore-config {name}"):
        read_architecture(plain | {name: other})
