"""Models of different tokenizers: told where they are merged, refused where samples are read."""

import json
from pathlib import Path

import pytest
from toys import copy_model, write_rows

SWAPPED = "the token 'b' has the id 68 in {older} and 67 in {newest}, the first of 2 with two ids"


def change(folder: Path, ids: dict[str, int | None]) -> Path:
    """Other ids for some tokens, None for none."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = {**content["model"]["vocab"], **ids}
    content["model"]["vocab"] = {t: i for t, i in vocab.items() if i is not None}
    path.write_text(json.dumps(content))
    return folder


@pytest.fixture
def older(toys, tmp_path) -> Path:
    return copy_model(toys.llama[0], tmp_path / "older")


@pytest.fixture
def newest(toys, tmp_path) -> Path:
    """Here a and b are each other's."""
    return change(copy_model(toys.llama[1], tmp_path / "newest"), {"a": 68, "b": 67})


@pytest.fixture
def recipe(tmp_path):
    def write(*models: Path, **values) -> Path:
        entries = [{"model": str(model)} for model in models]
        path = tmp_path / "recipe.yml"
        path.write_text(json.dumps({"models": entries, **values}))
        return path

    return write


def test_a_merge_by_elements_says_it_once(recall, older, newest, recipe, tmp_path):
    path = recipe(older, older, newest, merge_method="average")
    done = recall("merge", path, tmp_path / "out")
    said = SWAPPED.format(older=older, newest=newest)
    assert (done.status, done.err) == (
        0,
        f"warning: {said}: embeddings of different tokens are merged\n",
    )
    out = tmp_path / "out"
    assert (out / "tokenizer.json").read_bytes() == (newest / "tokenizer.json").read_bytes()
    assert any(
        said in line for line in json.loads((out / "recall_report.json").read_text())["warnings"]
    )


def test_all_that_read_samples_refuse(recall, toys, older, newest, recipe, tmp_path):
    data = {"samples": {"data": toys.data, "count": 4}}
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    own = {"models": [{"model": str(model), "data": toys.data} for model in (older, newest)]}
    merges = [
        {"merge_method": "recall", **data},
        {"merge_method": "lm_cocktail", "samples": {"typical": str(labelled)}},
        {"merge_method": "regmean", **own},
        {"merge_method": "regmean_plusplus", **own},
        {"merge_method": "recall_distill", "base_model": toys.llama[0], **own},
        {"merge_method": "recall", "samples": {"source": "random", "count": 4}},
    ]
    commands = [["merge", values, tmp_path / "out"] for values in merges]
    asked = [older, newest, "--data", toys.data, "--out"]
    commands += [["quick", *asked, tmp_path / "out"], ["extract", *asked, tmp_path / "out.npz"]]
    commands += [["similarity", *asked, tmp_path / "out"]]
    kept = sorted(tmp_path.iterdir())
    for command, *rest in commands:
        words = [recipe(older, newest, **word) if isinstance(word, dict) else word for word in rest]
        done = recall(command, *words)
        assert done.status == 2, (command, rest)
        model = toys.llama[0] if "base_model" in str(rest) else older
        assert done.err.startswith(f"recall: {SWAPPED.format(older=model, newest=newest)}")
        assert "--ignore-tokenizers" in done.err and done.err.count("\n") == 1
    assert {*sorted(tmp_path.iterdir())} - {*kept} == {tmp_path / "recipe.yml"}


def test_they_pass_where_that_is_to_be_ignored(recall, toys, older, newest, recipe, tmp_path):
    values = {"merge_method": "recall", "samples": {"data": toys.data, "count": 4}}
    path = recipe(older, newest, **values)
    said = SWAPPED.format(older=older, newest=newest)
    done = recall("merge", path, tmp_path / "one", "--ignore-tokenizers")
    assert done.status == 0 and said in done.err
    again = recall("merge", tmp_path / "one" / "recall_recipe.yml", tmp_path / "two")
    assert again.status == 0
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two")]
    assert weights[0] == weights[1]
    recipe(older, newest, ignore_tokenizers="yes", **values)
    assert "ignore_tokenizers" in recall("merge", path, tmp_path / "out").err


@pytest.mark.parametrize("texts", [["cde", "dec", "fgh"], ["cde", "dec~", "fgh"]])
def test_a_token_of_the_newest_alone_passes_where_no_sample_has_it(
    texts, recall, toys, older, recipe, tmp_path
):
    change(older, {"~": None, "new": 96})
    rows = write_rows(tmp_path / "rows.jsonl", texts)
    samples = {"data": str(rows), "count": 3}
    path = recipe(older, toys.llama[1], merge_method="recall", samples=samples)
    done = recall("merge", path, tmp_path / "out")
    if "~" in "".join(texts):
        assert done.status == 2
        assert "the samples hold 1 token, first '~' (id 96)" in done.err
    else:
        assert done.status == 0
        assert f"{older} does not know 1 token, first '~' (id 96)" in done.err
        assert "does not know 1 token, first 'new' (id 96)" in done.err


def test_the_samples_are_read_by_an_older_tokenizer_where_the_newest_has_none(
    recall, toys, recipe, tmp_path
):
    newest = copy_model(toys.llama[1], tmp_path / "newest")
    (newest / "tokenizer.json").unlink()
    samples = {"data": toys.data, "count": 4}
    path = recipe(Path(toys.llama[0]), newest, merge_method="recall", samples=samples)
    done = recall("merge", path, tmp_path / "out")
    assert (done.status, done.err) == (
        0,
        f"warning: {newest} has no tokenizer: that of {toys.llama[0]} is taken\n",
    )
    path = recipe(Path(toys.llama[0]), toys.llama[1], merge_method="recall", samples=samples)
    assert recall("merge", path, tmp_path / "same").status == 0
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "same")]
    assert weights[0] == weights[1]


def test_trees_that_bring_tokenizers_are_compared_too(recall, toys, older, newest, tmp_path):
    trees = []
    for model in (older, newest):
        trees.append(tmp_path / f"tree of {model.name}")
        assert recall("convert", model, trees[-1], "--to", "npz").status == 0
    values = {
        "models": [{"model": str(tree)} for tree in trees],
        "tree": {"embed": "embed/**", "layers": "layers/**", "axis": 0},
    }
    said = SWAPPED.format(older=trees[0], newest=trees[1])
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps({"merge_method": "average", **values}))
    done = recall("merge", path, tmp_path / "out")
    assert done.status == 0 and f"warning: {said}" in done.err
    samples = {"data": toys.data, "tokenizer": str(newest)}
    forward = {"merge_method": "recall", "forward": "json:loads", "samples": samples}
    path.write_text(json.dumps({**values, **forward}))
    done = recall("merge", path, tmp_path / "none")
    assert done.status == 2
    assert SWAPPED.format(older=trees[0], newest=newest) in done.err
    assert not (tmp_path / "none").exists()
