"""The stages on their own give what a merge gives, bit for bit, and their files keep their word."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from recall_jax.checkpoint.folder import open_checkpoint

COUNT = ["--count", "8"]


def tensors(folder) -> dict[str, bytes]:
    model = open_checkpoint(folder)
    return {name: model.read(name).tobytes() for name in model.specs}


def write_recipe(path: Path, models, data, **parameters) -> Path:
    recipe = {
        "merge_method": "recall",
        "models": [{"model": model} for model in models],
        "parameters": parameters,
        "samples": {"data": data, "count": 8},
    }
    path.write_text(json.dumps(recipe))
    return path


def succeed(recall, *arguments):
    done = recall(*arguments)
    assert done.status == 0, done.err
    return done


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_fields_by_name_in_every_stage_and_a_recipe(recall, toys, here):
    """Parquet too, of which what is not asked for need have no value in Python."""
    texts = [json.loads(line)["text"] for line in Path(toys.data).read_text().splitlines()]
    nanoseconds = pyarrow.array([1_234_567_890_123_456_789] * len(texts), pyarrow.timestamp("ns"))
    columns = {"q": [text[:2] for text in texts], "a": [text[2:] for text in texts]}
    pyarrow.parquet.write_table(pyarrow.table({**columns, "at": nanoseconds}), "rows.parquet")
    names = ["--prompt-field", "q", "--completion-field", "a"]
    data = ["--data", "rows.parquet", *names]
    model = toys.qwen2[-1]
    succeed(recall, "select", model, "--data", toys.data, "--out", "t.jsonl", *COUNT)
    succeed(recall, "select", model, *data, "--out", "named.jsonl", *COUNT)
    plain, named = (
        [json.loads(line) for line in Path(name).read_text().splitlines()]
        for name in ("t.jsonl", "named.jsonl")
    )
    assert [row["row"] for row in plain] == [row["row"] for row in named]
    assert [row["text"] for row in plain] == [row["q"] + row["a"] for row in named]
    assert {row["at"] for row in named} == {"2009-02-13 23:31:30.123456789"}
    succeed(recall, "extract", model, "--typical", "t.jsonl", "--out", "plain.npz")
    succeed(recall, "extract", model, "--typical", "named.jsonl", *names, "--out", "named.npz")
    assert Path("plain.npz").read_bytes() == Path("named.npz").read_bytes()
    recipe = write_recipe(here / "recipe.yml", toys.qwen2, "rows.parquet")
    written = json.loads(recipe.read_text())
    written["samples"] |= {"prompt_field": "q", "completion_field": "a"}
    recipe.write_text(json.dumps(written))
    succeed(recall, "merge", recipe, "by-recipe")
    succeed(recall, "quick", *toys.qwen2, *data, "--out", "quick", *COUNT)
    assert tensors("by-recipe") == tensors("quick")
    assert Path("by-recipe/typical.jsonl").read_bytes() == Path("named.jsonl").read_bytes()
    assert "prompt_field: q" in Path("quick/recall_recipe.yml").read_text()


@pytest.mark.parametrize("options", [
    {},
    {"reference": "pairwise", "temperature": 0.25},
    {"sigma": "dim", "alignment": "center", "similarity": {"rbf": 0.5, "cosine": 0.5}},
    {"merged_units": "first", "threshold": 0.7},
])  # fmt: skip
def test_stage_by_stage_is_the_same_merge(options, recall, toys, here):
    recipe = write_recipe(here / "recipe.yml", toys.qwen2, toys.data, **options)
    succeed(recall, "merge", recipe, "whole")
    words = {name: json.dumps(value).strip('"') for name, value in options.items()}
    if "similarity" in options:
        words["similarity"] = "rbf=0.5,cosine=0.5"
    flags = [
        word for name, value in words.items() for word in (f"--{name.replace('_', '-')}", value)
    ]
    succeed(recall, "select", toys.qwen2[-1], "--data", toys.data, "--out", "t.jsonl", *COUNT)
    succeed(recall, "extract", *toys.qwen2, "--typical", "t.jsonl", "--out", "reps.npz")
    succeed(recall, "weights", "--reps", "reps.npz", "--out", "weights.json", *flags)
    succeed(recall, "merge", recipe, "staged", "--weights", "weights.json")
    succeed(recall, "merge", recipe, "given", "--typical", "t.jsonl")
    succeed(recall, "merge", recipe, "again", "--weights", "whole/recall_report.json")

    assert Path("t.jsonl").read_bytes() == Path("whole/typical.jsonl").read_bytes()
    whole = json.loads(Path("whole/recall_report.json").read_text())
    weights = json.loads(Path("weights.json").read_text())
    keys = ("units", "models", "reference", "typical_samples", "weights", "similarity", "sigma")
    for key in (*keys, "adjacent", "warnings"):
        assert weights[key] == whole[key], key
    for out in ("staged", "given", "again"):
        report = json.loads(Path(out, "recall_report.json").read_text())
        for key in keys:
            assert report[key] == whole[key], (out, key)
        assert tensors(out) == tensors("whole"), out
    # each of them can be run again from its own folder
    for out in ("staged", "given"):
        succeed(recall, "merge", f"{out}/recall_recipe.yml", f"{out}2")
        assert tensors(f"{out}2") == tensors("whole")


def test_typical_rows_are_as_they_were(recall, toys, here):
    rows = [{"text": text, "id": f"ä{i}", "n": {"a": [i]}} for i, text in enumerate("abcdefgh")]
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    line = ["select", toys.llama[0], "--data", "rows.jsonl", "--count", "3", "--unit", "embed"]
    done = succeed(recall, *line, "--out", "typical.jsonl")
    chosen = [json.loads(line) for line in Path("typical.jsonl").read_text().splitlines()]
    assert len(chosen) == 3
    for row in chosen:
        number = row.pop("row")
        assert row == rows[number]
        assert str(number) in done.out
    # the same seed chooses the same rows
    succeed(recall, *line, "--out", "again.jsonl")
    assert Path("again.jsonl").read_bytes() == Path("typical.jsonl").read_bytes()


def test_extract_holds_every_unit_of_every_row(recall, toys, here):
    line = ["extract", *toys.llama, "--data", toys.data]
    succeed(recall, *line, "--out", "reps.npz")
    with np.load("reps.npz") as file:
        assert set(file.files) >= {"reps", "rows", "units"}
        reps, rows, units = file["reps"], file["rows"], file["units"]
        assert list(file["models"]) == toys.llama
    assert reps.shape == (2, 5, 40, 32) and reps.dtype == np.float32
    assert rows.tolist() == list(range(40)) and np.issubdtype(rows.dtype, np.integer)
    assert units.tolist() == ["embed", "layers.0", "layers.1", "layers.2", "head"]
    # a draw of the rows, in batches of another size, gives the same states
    succeed(recall, *line, "--pool", "11", "--batch-size", "3", "--out", "some.npz")
    with np.load("some.npz") as file:
        assert len(file["rows"]) == 11 and (np.diff(file["rows"]) > 0).all()
        np.testing.assert_allclose(file["reps"], reps[:, :, file["rows"]], rtol=1e-4, atol=1e-5)


@pytest.mark.eight_devices
def test_extract_over_a_mesh_is_the_same(recall, toys, here):
    options = ["--data", toys.data, "--pool", 5, "--quiet"]
    reps = []
    for mesh in ([], ["--mesh", "data=2,fsdp=2,tensor=2"], ["--mesh", "auto"]):
        out = f"{len(reps)}.npz"
        assert recall("extract", *toys.qwen2[:2], *options, "--out", out, *mesh).status == 0
        reps.append(np.load(here / out)["reps"])
    for over_mesh in reps[1:]:
        np.testing.assert_allclose(over_mesh, reps[0], rtol=0, atol=1e-5)
    refused = recall("extract", *toys.qwen2, *options, "--out", "x.npz", "--mesh", "fsdp=9")
    assert (refused.status, refused.out) == (2, "")
    assert "needs 9 devices; there are 8" in refused.err


def test_a_file_of_representations_needs_no_more_than_reps(recall, here):
    reps = np.random.default_rng(0).standard_normal((3, 4, 5, 6))
    np.savez("reps.npz", reps=reps)
    succeed(recall, "weights", "--reps", "reps.npz", "--out", "w.json", "--sigma", "2")
    record = json.loads(Path("w.json").read_text())
    assert record["units"] == ["embed", "layers.0", "layers.1", "head"]
    assert len(record["models"]) == 3 and record["reference"] == 2
    distance = ((reps - reps[-1]) ** 2).sum(axis=-1)
    similarity = np.exp(-distance / 8).mean(axis=-1)
    np.testing.assert_allclose(record["similarity"], similarity, rtol=1e-5)
    weights = np.exp(similarity) / np.exp(similarity).sum(axis=0)
    np.testing.assert_allclose(record["weights"], weights, rtol=1e-5)


def test_stages_replace_only_when_forced(recall, toys, here):
    Path("t.jsonl").write_text("precious")
    line = ["select", toys.llama[0], "--data", toys.data, "--out", "t.jsonl", *COUNT]
    assert recall(*line).status == 2
    assert Path("t.jsonl").read_text() == "precious"
    succeed(recall, *line, "--force")
    assert len(Path("t.jsonl").read_text().splitlines()) == 8
    assert [path.name for path in here.iterdir()] == ["t.jsonl"]
