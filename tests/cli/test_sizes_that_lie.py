"""Numbers in a config that the tensors do not have: one line, at once, whatever the command."""

import json
import time

import pytest
from toys import copy_model, tree

SIZES = {
    "layers": ({"num_hidden_layers": 100_000_000}, "num_hidden_layers is 100000000"),
    "layers beyond any number": ({"num_hidden_layers": 10**90}, "num_hidden_layers is 1000"),
    "a vocabulary": ({"vocab_size": 2**40}, "vocab_size is 1099511627776"),
    "a width": ({"hidden_size": 2**30}, "hidden_size is 1073741824"),
    "an inner width": ({"intermediate_size": 10**30}, "intermediate_size is 1000"),
    "heads": ({"num_attention_heads": 2**30, "num_key_value_heads": 1}, "num_attention_heads is"),
    "a head's width": ({"head_dim": 2**30}, "head_dim is 1073741824"),
    "no width of a head": ({"head_dim": 0}, "head_dim is 0"),
    "positions": ({"max_position_embeddings": 10**18}, "max_position_embeddings is 1000"),
}
COMMANDS = {
    "merge": ["merge", "r.yml", "out"],
    "plan": ["plan", "r.yml", "--devices", "v5e-16"],
    "evaluate": ["evaluate", "{}", "--tasks", "text_names", "--limit", "1"],
    "similarity": ["similarity", "{}", "--data", "{data}"],
    "convert": ["convert", "{}", "out", "--to", "npz"],
}


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("command", COMMANDS)
def test_sizes_are_held_to_the_tensors(command, case, recall, toys, tmp_path, monkeypatch):
    sizes, said = SIZES[case]
    monkeypatch.chdir(tmp_path)
    model = copy_model(toys.llama[0], tmp_path / "model", **sizes)
    recipe = {"merge_method": "recall", "models": [{"model": m} for m in (toys.llama[1], "model")]}
    (tmp_path / "r.yml").write_text(json.dumps(recipe | {"samples": {"data": toys.data}}))
    before, began = tree(tmp_path), time.monotonic()
    done = recall(*(word.format(model, data=toys.data) for word in COMMANDS[command]))
    assert time.monotonic() - began < 10
    assert done.status == 2, done
    assert done.err.count("\n") == 1
    assert len(done.err) < 500
    assert said in done.err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("case", SIZES)
def test_verify_and_inspect_say_so(case, recall, toys, tmp_path):
    sizes, said = SIZES[case]
    model = copy_model(toys.llama[0], tmp_path / "model", **sizes)
    inspected = recall("inspect", model)
    assert said in inspected.out
    verified = recall("verify", model)
    assert said in verified.out + verified.err
    is_held = not said.startswith(("head_dim is 0", "max_position"))
    assert verified.status == (1 if is_held else 0)


@pytest.mark.parametrize("key", ["count", "pool", "max_tokens", "batch_size"])
def test_counts_beyond_all_rows_are_those_of_all(key, recall, toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a b"}\n{"text": "c"}\n')
    samples = {"data": "rows.jsonl", "batch_size": 2}
    recipe = {"merge_method": "recall", "models": [{"model": model} for model in toys.llama]}
    for name, count in {"some": 2, "all": 10**90}.items():
        values = recipe | {"samples": samples | ({} if name == "some" else {key: count})}
        (tmp_path / "r.yml").write_text(json.dumps(values))
        assert recall("merge", "r.yml", name).status == 0
    some, every = (
        json.loads((tmp_path / name / "recall_report.json").read_text()) for name in ("some", "all")
    )
    assert some["weights"] == every["weights"]


TASK = {"task": "t", "prompt": "{{ text }}", "scoring": {"by": "perplexity"}}


@pytest.mark.parametrize("generator", ["strings", "text"])
def test_rows_to_be_made_have_a_number(generator, recall, toys, tmp_path):
    source = {"generator": generator, "task": "nest", "count": 10**12}
    (tmp_path / "t.yml").write_text(json.dumps({**TASK, "source": source}))
    done = recall("evaluate", toys.llama[0], "--tasks", tmp_path / "t.yml", "--limit", "1")
    assert done.status == 2
    assert "source.count should be less than or equal to 1000000" in done.err


def test_a_batch_has_a_number_of_rows(recall, toys):
    done = recall("evaluate", toys.llama[0], "--tasks", "text_names", "--batch-size", 10**30)
    assert done.status == 2
    assert "--batch-size must be below 2^31" in done.err


def test_a_list_for_another_number_of_layers(recall, toys, tmp_path):
    kinds = ["full_attention"] * 100_000
    model = copy_model(toys.qwen2[0], tmp_path / "model", layer_types=kinds)
    done = recall("evaluate", model, "--tasks", "text_names", "--limit", "1")
    assert done.status == 2
    assert "layer_types" in done.err
    assert len(done.err) < 500


def test_many_attributes_that_are_not_known(recall, toys, tmp_path):
    unknown = {f"option_{index}{'x' * 500}": index for index in range(5000)}
    model = copy_model(toys.llama[0], tmp_path / "model", **unknown)
    done = recall("evaluate", model, "--tasks", "text_names", "--limit", "1")
    assert done.status == 2
    assert "and 4980 more" in done.err
    assert len(done.err) < 5000
