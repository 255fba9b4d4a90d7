"""YAML from outside: as `yaml.safe_load` reads it, and whatever is wrong or huge is one line."""

import time

import pytest
import yaml

from recall_jax.errors import InputError
from recall_jax.files.yaml_text import parse_documents
from recall_jax.recipes.recipe import read_recipe

AS_SAFE_LOAD = {
    "a merge": "a: &x {k: 1}\nb: {<<: *x, j: 2}\n",
    "a merge that is overridden": "a: &x {k: 1}\nb: {k: 2, <<: *x}\n",
    "several merges": "a: &x {k: 1}\nb: &y {k: 2, j: 3}\nc: {<<: [*x, *y]}\nd: {<<: *x, <<: *y}\n",
    "a merge of a merge": "a: &x {k: 1}\nb: &y {<<: *x, j: 2}\nc: {<<: *y, k: 3}\nd: *y\n",
    "a merge within what is merged": "a: &x {p: {<<: {q: 1}}}\nb: {<<: *x}\nc: *x\n",
    "a merge of what stands there": "b: {<<: {k: 1}, j: 2}\n",
    "anchors": "a: &x [1, 2]\nb: [*x, *x]\nc: &y text\nd: *y\n",
    "an anchor on a key": "&x a: 1\nb: *x\n",
    "signs as keys": "=: 1\nb: {'<<': 2, '=': 3}\n",
    "kinds": "a: 2020-01-01\nb: 0x1F\nc: 1:30\nd: .inf\ne: ~\nf: !!set {a, b}\ng: !!binary aGk=\n",
    "keys that only look alike": "2: a\n'2': b\n2.5: c\ntrue: d\n",
}
BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
FAULTS = {
    "a kind by name": ("a: !!int z", "'z' is no int (line 1, column 4)"),
    "a kind without anything": ("a: !!int ''", "'' is no int"),
    "a truth": ("a: !!bool z", "'z' is no bool"),
    "a date": ("a: 1\nb: 2020-99-99", "'2020-99-99' is no timestamp (line 2, column 4)"),
    "brackets": ("a: " + "[" * 500, "more than 100 levels"),
    "depth by aliases": (
        "a0: &a0 []\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200)),
        "more than 100 levels",
    ),
    "aliases": ("a0: &a0 {k: v}\n" + BOMB, "more than 100,000 values"),
    "merges": (
        "a0: &a0 {k: v}\n" + BOMB.replace("[", "{<<: [").replace("]", "]}"),
        "more than 100,000 values",
    ),
    "values": ("a: [" + "1," * 200_000 + "]", "more than 100,000 values"),
    "what contains itself": ("a: &a [*a]", "inside the value that it refers to"),
    "what merges itself": ("a: &a {<<: *a}", "inside the value that it refers to"),
    "digits": ("a: " + "9" * 400, "a number of 400 digits"),
    "digits of a fraction": ("a: 0." + "9" * 5000, "a number of 5002 digits"),
    "sixties": ("a: 1" + ":59" * 3000, "a number of 9001 digits"),
    "a key twice": ("a: 1\nb: 2\na: 3", "the key 'a' is given twice (line 3, column 1)"),
    "a key twice, quoted": ("{x: 1, 'x': 2}", "the key 'x' is given twice"),
    "a key twice in what is merged": ("b: {<<: {k: 1, k: 2}}", "the key 'k' is given twice"),
    "a number twice": ("1: a\n0x1: b", "the key 1 is given twice"),
    "an alias of nothing": ("a: *" + "n" * 5000, "undefined alias 'nnn"),
    "a merge of a number": ("a: {<<: 3}", "for merging"),
    "code": ("a: !!python/name:os.system x", "could not determine a constructor"),
    "an escape": ('a: "\x1b"', "not allowed"),
}


@pytest.mark.parametrize("case", AS_SAFE_LOAD)
def test_what_safe_load_reads_is_read_as_it_does(case):
    text = AS_SAFE_LOAD[case]
    [read], expected = parse_documents(text, "file"), yaml.safe_load(text)
    assert read == expected
    assert repr(read) == repr(expected)  # kinds and order too


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_wrong_is_one_short_line_with_its_place(case):
    text, said = FAULTS[case]
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        parse_documents(text, "dir/file.yml")
    assert time.monotonic() - began < 10
    line = str(caught.value)
    assert line.startswith("dir/file.yml is not YAML: ")
    assert said in line
    assert line.isprintable()
    assert len(line) < 250


def test_a_recipe_may_share_its_parts(tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(
        "merge_method: linear\n"
        "models:\n"
        "- &first {model: a, parameters: &half {weight: 0.5}}\n"
        "- {<<: *first, model: b}\n"
        "- {model: c, parameters: {<<: *half, weight: 2}}\n"
    )
    recipe = read_recipe(path)
    assert [entry.model for entry in recipe.models] == ["a", "b", "c"]
    assert [entry.parameters.model_dump()["weight"] for entry in recipe.models] == [0.5, 0.5, 2]


def test_a_file_of_yaml_has_a_size(tmp_path):
    path = tmp_path / "recipe.yml"
    with path.open("wb") as file:
        file.truncate(10**10)
    with pytest.raises(InputError, match=r"recipe\.yml has over 4,000,000 bytes"):
        read_recipe(path)


@pytest.mark.parametrize("value", ["x" * 10**6, list(range(9999)), "9" * 90, "\u202e"])
def test_a_value_that_does_not_fit_is_shown_in_part(value, tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump({"merge_method": "average", "models": [{"model": 1}, value]}))
    with pytest.raises(InputError) as caught:
        read_recipe(path)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()
