"""Recipes: mergekit's are read as it reads them, and every fault is one line with its place."""

import re
from pathlib import Path

import pytest
import yaml

from recall_jax.errors import InputError
from recall_jax.methods.parameters import parameter_at
from recall_jax.recipes.recipe import make_recipe, read_recipe

TWO = "models:\n  - model: base\n  - model: fine\n"
RECALL = "merge_method: recall\nsamples: {data: rows.jsonl}\n" + TWO


def read(tmp_path: Path, text: str):
    path = tmp_path / "recipe.yml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path)


def fault(tmp_path: Path, text: str) -> str:
    """The one line that a wrong recipe is answered with."""
    with pytest.raises(InputError) as raised:
        read(tmp_path, text)
    line = str(raised.value)
    assert "\n" not in line
    assert "recipe.yml" in line
    return line


def test_a_short_recipe_has_the_defaults(tmp_path):
    recipe = read(tmp_path, RECALL)
    assert [entry.model for entry in recipe.models] == ["base", "fine"]
    assert recipe.parameters.model_dump() == {
        "sigma": "median",
        "temperature": 1.0,
        "reference": "newest",
        "similarity": "rbf",
        "alignment": "none",
        "merged_units": "all",
        "threshold": None,
    }
    assert recipe.samples.model_dump() == {
        "source": "data",
        "data": "rows.jsonl",
        "typical": None,
        "prompts": None,
        "field": None,
        "prompt_field": None,
        "completion_field": None,
        "tokenizer": None,
        "count": 20,
        "pool": 1024,
        "max_tokens": 512,
        "batch_size": 8,
        "seed": 0,
        "unit": "last",
    }
    assert recipe.dtype is recipe.out_dtype is recipe.weights is None


def test_every_parameter_of_recall_is_read(tmp_path):
    recipe = read(
        tmp_path,
        RECALL.replace(
            "{data: rows.jsonl}", "{typical: t.csv, field: q, max_tokens: 9, batch_size: 2}"
        )
        + "parameters:\n"
        "  sigma: 2\n  temperature: 0.5\n  reference: base\n  alignment: center\n"
        "  similarity: {rbf: 0.5, cosine: 2}\n"
        "dtype: float32\nout_dtype: bfloat16\n",
    )
    assert recipe.parameters.sigma == 2.0
    assert recipe.parameters.temperature == 0.5
    assert recipe.parameters.reference == "base"
    assert recipe.parameters.similarity == {"rbf": 0.5, "cosine": 2.0}
    assert recipe.parameters.alignment == "center"
    assert (recipe.samples.typical, recipe.samples.field) == ("t.csv", "q")
    assert (recipe.samples.max_tokens, recipe.samples.batch_size) == (9, 2)
    assert (recipe.dtype, recipe.out_dtype) == ("float32", "bfloat16")


def test_a_mergekit_recipe_is_read_as_it_stands(tmp_path):
    recipe = read(
        tmp_path,
        """
        models:
          - model: org/base
            parameters:
              weight: 1
          - model: org/fine+org/adapter
            parameters:
              weight:
                - filter: self_attn
                  value: [0, 0.5, 1]
                - filter: mlp
                  value: 0.25
                - value: 0.5
        merge_method: linear
        parameters:
          normalize: false
          int8_mask: true
        dtype: float16
        """,
    )
    assert recipe.parameters.normalize is False
    weight = recipe.models[1].parameters.weight
    for layer, depth, expected in ((0, 0.0, 0.0), (1, 0.25, 0.25), (2, 0.5, 0.5), (4, 1.0, 1.0)):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        assert parameter_at(weight, name, depth) == pytest.approx(expected)
        assert parameter_at(weight, f"model.layers.{layer}.mlp.up_proj.weight", depth) == 0.25
    assert parameter_at(weight, "lm_head.weight", 1.0) == 0.5
    assert parameter_at(recipe.models[0].parameters.weight, "lm_head.weight", 1.0) == 1.0


@pytest.mark.parametrize("text", [
    RECALL,
    RECALL + "parameters: {sigma: 0.1, similarity: {rbf: 0.3, linear_cka: 0.7}, reference: 0}\n",
    "merge_method: average\n" + TWO + "out_dtype: float16\n",
    "merge_method: linear\nmodels:\n- {model: ä b, parameters: {weight: [0, 0.1]}}\n"
    "- {model: c, parameters: {weight: [{filter: mlp, value: [1, 2]}, {value: 3.5}]}}\n",
    "merge_method: linear\nparameters: {weight: 0.1, normalize: false}\n" + TWO,
])  # fmt: skip
def test_a_recipe_written_out_is_the_same_recipe(text, tmp_path):
    recipe = read(tmp_path, text)
    written = recipe.to_yaml()
    assert read(tmp_path, written) == recipe
    assert make_recipe(yaml.safe_load(written)) == recipe


# What is wrong, and what the answer must speak of.
UNKNOWN = {
    "a key": (RECALL + "temprature: 1\n", "temprature"),
    "a parameter, with a hint": (RECALL + "parameters: {temprature: 1}\n", "temperature"),
    "a key of the samples, with a hint": (
        RECALL.replace("rows.jsonl", "rows.jsonl, cuont: 3"),
        "samples.cuont; did you mean count",
    ),
    "a key of a model, with a hint": (
        "merge_method: linear\nmodels: [{model: a, parmeters: {weight: 1}}]\n",
        "models.0.parmeters; did you mean parameters",
    ),
    "a parameter of a model, with a hint": (
        "merge_method: linear\nmodels: [{model: a, parameters: {wieght: 1}}]\n",
        "models.0.parameters.wieght; did you mean weight",
    ),
    "rows of a model, and samples without data": (
        "merge_method: regmean\nsamples: {source: random}\n"
        "models: [{model: a}, {model: b, data: rows.jsonl}]\n",
        "samples.source random needs no models.1.data: remove it",
    ),
    "a parameter of another method": (
        "merge_method: average\nparameters: {sigma: 1}\n" + TWO,
        "parameters.sigma",
    ),
    "a weight of a model, for recall": (
        RECALL.replace("model: fine", "model: fine\n    parameters: {weight: 1}"),
        "models.1.parameters.weight",
    ),
    "a method": ("merge_method: recal\n" + TWO, "recall, linear, average"),
    "no method": (TWO, "merge_method"),
    "a method that is a list": ("merge_method: [recall]\n" + TWO, "merge_method"),
    "a dtype": ("merge_method: average\nout_dtype: int4\n" + TWO, "out_dtype.*bfloat16"),
    "an alignment": (RECALL + "parameters: {alignment: rotate}\n", "alignment.*procrustes"),
    "mergekit's slices": (
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n",
        "slices",
    ),
    "mergekit's base_model": ("merge_method: linear\nbase_model: a\n" + TWO, "base_model"),
}
WRONG = {
    "a number in words": (RECALL + "parameters: {temperature: hot}\n", "temperature.*'hot'"),
    "a number as text": (RECALL + "parameters: {temperature: '1'}\n", "temperature.*'1'"),
    "true for a number": (RECALL + "parameters: {temperature: true}\n", "temperature.*True"),
    "NaN": (RECALL + "parameters: {temperature: .nan}\n", "temperature.*nan"),
    "infinity": (RECALL + "parameters: {temperature: .inf}\n", "temperature.*inf"),
    "zero": (RECALL + "parameters: {temperature: 0}\n", "temperature.*greater than 0"),
    "sigma in other words": (RECALL + "parameters: {sigma: mean}\n", "sigma.*median.*dim"),
    "sigma below zero": (RECALL + "parameters: {sigma: -1}\n", "sigma"),
    "sigma NaN": (RECALL + "parameters: {sigma: .nan}\n", "sigma"),
    "sigma true": (RECALL + "parameters: {sigma: true}\n", "sigma"),
    "sigma null": (RECALL + "parameters: {sigma: null}\n", "sigma"),
    "a reference that is a fraction": (RECALL + "parameters: {reference: 0.5}\n", "reference"),
    "a reference that is true": (RECALL + "parameters: {reference: true}\n", "reference"),
    "a mix of words": (RECALL + "parameters: {similarity: {rbf: much}}\n", "similarity"),
    "a mix with a zero": (RECALL + "parameters: {similarity: {rbf: 0}}\n", "similarity"),
    "parameters that are a list": (RECALL + "parameters: [1]\n", "parameters"),
    "parameters that are a number": (RECALL + "parameters: 1\n", "parameters"),
    "no count": (RECALL.replace("rows.jsonl", "rows.jsonl, count: 0"), "samples.count"),
    "a count as text": (RECALL.replace("rows.jsonl", "rows.jsonl, count: '3'"), "samples.count"),
    "half a count": (RECALL.replace("rows.jsonl", "rows.jsonl, count: 2.5"), "samples.count"),
    "a seed below zero": (RECALL.replace("rows.jsonl", "rows.jsonl, seed: -1"), "samples.seed"),
    "a unit that is a fraction": (RECALL.replace("rows.jsonl", "x, unit: 0.5"), "samples.unit"),
    "a list of data": (RECALL.replace("rows.jsonl", "[rows.jsonl]"), "samples.data"),
    "samples that are a path": (RECALL.replace("{data: rows.jsonl}", "rows.jsonl"), "samples"),
    "neither data nor typical": (RECALL.replace("data: rows.jsonl", ""), "data.*typical"),
    "both data and typical": (RECALL.replace("rows.jsonl", "a, typical: b"), "data.*typical"),
    "a text and a prompt by name": (
        RECALL.replace("rows.jsonl", "a, field: b, prompt_field: c"),
        "samples.*either samples.field .*or samples.prompt_field",
    ),
    "a prompt by name, of rows that are drawn": (
        RECALL.replace("data: rows.jsonl", "source: random, completion_field: c"),
        "source: random needs no data: remove completion_field",
    ),
    "no samples": ("merge_method: recall\n" + TWO, "samples"),
    "samples for the average": (RECALL.replace("recall", "average"), "samples"),
    "one model for recall": (RECALL.replace("  - model: fine\n", ""), "at least 2"),
    "no models": ("merge_method: average\n", "models"),
    "an empty list of models": ("merge_method: average\nmodels: []\n", "models"),
    "models that are names": ("merge_method: average\nmodels: [a, b]\n", "models.0"),
    "models that are a mapping": ("merge_method: average\nmodels: {a: b}\n", "models"),
    "a model without a name": ("merge_method: average\nmodels: [{model: ''}]\n", "models.0.model"),
    "a model that is a number": ("merge_method: average\nmodels: [{model: 3}]\n", "models.0.model"),
    "a model that is missing": ("merge_method: average\nmodels: [{}]\n", "models.0.model"),
    "a weight as text": ("merge_method: linear\nparameters: {weight: '1'}\n" + TWO, "weight.*'1'"),
    "a weight that is true": ("merge_method: linear\nparameters: {weight: true}\n" + TWO, "weight"),
    "a weight that is NaN": ("merge_method: linear\nparameters: {weight: .nan}\n" + TWO, "weight"),
    "a weight without end": ("merge_method: linear\nparameters: {weight: .inf}\n" + TWO, "weight"),
    "an empty gradient": ("merge_method: linear\nparameters: {weight: []}\n" + TWO, "weight"),
    "a gradient of words": ("merge_method: linear\nparameters: {weight: [0, a]}\n" + TWO, "weight"),
    "a filter without a value": (
        "merge_method: linear\nparameters: {weight: [{filter: mlp}]}\n" + TWO,
        "weight",
    ),
    "normalize in words": (
        "merge_method: linear\nparameters: {normalize: 'no way'}\n" + TWO,
        "normalize",
    ),
    "weights that are a list": (RECALL + "weights: [1]\n", "weights"),
    "a key that is a number": (RECALL + "7: 1\n", "7"),
}  # fmt: skip
NO_MAPPING = {
    "nothing": "",
    "a comment": "# merge_method: average\n",
    "a list": "- merge_method: average\n",
    "a word": "average\n",
    "two documents": "merge_method: average\n---\n" + TWO,
}
NO_YAML = {
    "an open bracket": "models: [a\n",
    "a tab": "models:\n\t- a\n",
    "code": "merge_method: !!python/object/apply:os.system ['true']\n",
    "a colon too many": "merge_method: a: b\n",
    "a zero byte": 'merge_method: "\0"\n',
    "a key that is a list": "? [a, b]\n: 1\n",
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_unknown_is_refused_by_name(case, tmp_path):
    text, pattern = UNKNOWN[case]
    assert_speaks_of(fault(tmp_path, text), pattern)


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_with_its_place(case, tmp_path):
    text, pattern = WRONG[case]
    assert_speaks_of(fault(tmp_path, text), pattern)


@pytest.mark.parametrize("case", NO_MAPPING)
def test_a_recipe_is_one_mapping(case, tmp_path):
    assert_speaks_of(fault(tmp_path, NO_MAPPING[case]), "one mapping")


@pytest.mark.parametrize("case", NO_YAML)
def test_a_recipe_is_yaml_without_code(case, tmp_path):
    assert_speaks_of(fault(tmp_path, NO_YAML[case]), "not YAML")


def assert_speaks_of(line: str, pattern: str) -> None:
    assert re.search(pattern, line), line
    # the words of the schema's library and the names of its classes are not the user's
    assert not re.search(r"pydantic|instance of|ModelEntry|FilteredValue|Keys should", line), line


@pytest.mark.parametrize("text", [
    RECALL + "merge_method: average\n",
    RECALL + "parameters: {temperature: 1, temperature: 2}\n",
])  # fmt: skip
def test_a_key_given_twice_is_refused(text, tmp_path):
    assert_speaks_of(fault(tmp_path, text), "twice|duplicate")


@pytest.mark.parametrize("number", ["1e-1", "1.0e-1", "1E-1"])
def test_numbers_may_have_an_exponent(number, tmp_path):
    assert (
        read(tmp_path, RECALL + f"parameters: {{temperature: {number}}}\n").parameters.temperature
        == 0.1
    )


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_a_recipe_that_cannot_be_read(content, tmp_path):
    path = tmp_path / "recipe.yml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"recipe\.yml"):
        read_recipe(path)
    with pytest.raises(InputError, match="directory"):
        read_recipe(tmp_path)


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_bytes(b"\xef\xbb\xbf" + RECALL.encode())
    assert read_recipe(path).merge_method == "recall"


def test_yaml_that_contains_itself_is_refused(tmp_path):
    fault(tmp_path, "merge_method: average\nmodels: &all [{model: a, parameters: *all}]\n")
    fault(tmp_path, "merge_method: average\nmodels: &all [*all]\n")
