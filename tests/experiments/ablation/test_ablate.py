"""An ablation from end to end: what each variant comes to, the files, and going on."""

import json
import shutil

import numpy as np
import pytest
import yaml
from scipy.stats import ttest_rel
from toys import Toys, copy_model, tree

import recall_jax.experiments.ablation.run as run_module
import recall_jax.jobs.evaluate as evaluation
from recall_jax.errors import InputError, StorageError
from recall_jax.evaluation.task import find_task
from recall_jax.experiments.ablation.recipe import read_ablation
from recall_jax.experiments.ablation.run import AblationOptions, ablate
from recall_jax.experiments.ablation.scores import check_comparable, mean_difference, row_shares
from recall_jax.jobs.merge import merge
from recall_jax.recipes.recipe import make_recipe
from recall_jax.report.ablation_page import render_ablation, tables_in_markdown

TASKS = ("letters", "digits")
AXES = {
    "temperature": [1e6, 0.2],
    "merged_units": ["first"],
    "threshold": [2.0],
}


@pytest.fixture(scope="module")
def place(toys: Toys, tmp_path_factory):
    """Two models that know the end of a text, tasks of texts, and a recipe."""
    folder = tmp_path_factory.mktemp("ablation")
    for k, model in enumerate(toys.llama):
        copy_model(model, folder / f"model-{k}", eos_token_id=1)
    generator = np.random.default_rng(0)
    for task, letters in zip(TASKS, ("abcdefgh XYZ", "0123456789"), strict=True):
        rows = ["".join(generator.choice(list(letters), 9 + i % 5)) for i in range(12)]
        path = folder / "data" / task / "rows.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        definition = {
            "task": task,
            "source": {"splits": {"test": [{"files": "rows.jsonl"}]}},
            "prompt": "{{ text }}",
            "scoring": {"by": "perplexity"},
        }
        (folder / f"{task}.yml").write_text(yaml.safe_dump(definition))
    values = {
        "merge_method": "recall",
        "models": [{"model": str(folder / f"model-{k}")} for k in range(2)],
        "samples": {"data": toys.data, "count": 5, "max_tokens": 16},
        "tasks": {"seen": [str(folder / "letters.yml")], "unseen": [str(folder / "digits.yml")]},
        "evaluate": {"batch_size": 4, "data_root": str(folder / "data")},
        "ablate": AXES,
    }
    (folder / "varied.yml").write_text(yaml.safe_dump(values, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    return ablate(read_ablation(place / "varied.yml"), out), out


def scores(record, name):
    return {task: found["bits_per_byte"] for task, found in record["runs"][name]["results"].items()}


def test_a_variant_is_a_merge_and_an_evaluation(place, whole, tmp_path):
    record, _ = whole
    own = read_ablation(place / "varied.yml").recipe.model_dump(exclude_none=True)
    recipe = make_recipe(own | {"parameters": {"temperature": 0.2}})
    report = merge(recipe, tmp_path / "merged")
    tasks = [find_task(str(place / f"{task}.yml")) for task in TASKS]
    asking = evaluation.EvaluateOptions(data_root=place / "data", batch_size=4)
    expected = evaluation.evaluate([str(tmp_path / "merged")], tasks, options=asking)
    expected = expected["results"][0]
    run = record["runs"]["temperature 0.2"]
    assert run["results"] == json.loads(json.dumps(expected))
    for key in ("weights", "similarity", "sigma", "typical_samples"):
        assert run[key] == report[key]


def test_ends_of_the_axes_are_the_newest_model_and_the_average(whole):
    record, _ = whole
    assert scores(record, "threshold 2") == scores(record, "newest")
    average = scores(record, "average")
    for task, found in scores(record, "temperature 1e+06").items():
        np.testing.assert_allclose(found["value"], average[task]["value"], rtol=1e-5)
    assert scores(record, "own") != average
    weights = np.asarray(record["runs"]["merged_units first"]["weights"])
    assert (weights[:, 2:] == [[0], [1]]).all() and (weights[:, :2] > 0).all()


def test_means_and_differences_are_of_the_same_rows(whole):
    record, _ = whole
    assert record["less_is_better"] and list(record["groups"]) == ["all", "seen", "unseen"]
    run, own = record["runs"]["newest"], record["runs"]["own"]
    mine, its = scores(record, "newest"), scores(record, "own")
    for group, tasks in record["groups"].items():
        value = np.mean([mine[task]["value"] for task in tasks])
        np.testing.assert_allclose(run["means"][group]["value"], value)
        gap = value - np.mean([its[task]["value"] for task in tasks])
        np.testing.assert_allclose(run["differences"][group]["value"], gap, rtol=1e-9)
    assert own["differences"]["all"] == {"value": 0.0, "standard_error": 0.0}


def test_a_difference_has_the_error_of_a_paired_test():
    generator = np.random.default_rng(0)
    first, second = generator.random((2, 40))
    found = mean_difference([first.tolist()], [second.tolist()])
    test = ttest_rel(first, second)
    np.testing.assert_allclose(found["value"] / found["standard_error"], test.statistic)
    both = mean_difference([first, first], [second, second])
    np.testing.assert_allclose(both["standard_error"], found["standard_error"] / np.sqrt(2))
    assert mean_difference([None], [first]) is None and mean_difference([[1.0]], [[0.5]]) is None


def test_shares_of_rows_make_up_the_metric():
    texts = [{"nats": 3.0, "bytes": 2}, {"nats": 5.0, "bytes": 6}]
    assert np.mean(row_shares("bits_per_byte", texts)) == pytest.approx(8 / np.log(2) / 8)
    assert row_shares("accuracy", [{"accuracy": 1.0}, {"accuracy": 0.0}]) == [100.0, 0.0]
    assert row_shares("bleu", [{"prediction": "a"}]) is None


def test_tasks_of_texts_have_no_mean_with_others():
    tasks = [find_task("text_topics"), find_task("strings_sort")]
    with pytest.raises(InputError, match="text_topics is scored in bits per byte and others"):
        check_comparable(tasks)
    assert check_comparable(tasks[:1]) and not check_comparable(tasks[1:])


def test_the_units_are_looked_at(whole):
    record, _ = whole
    found, units = record["domains"], len(record["units"])
    assert found["domains"] == {"letters": 12, "digits": 12} and found["chance"] == 0.5
    for key in ("within", "across", "neighbour_accuracy"):
        assert np.shape(found[key]) == (3, units)
    # texts of different characters are told apart where the embeddings are all there is
    assert found["neighbour_accuracy"][0][0] > 0.9
    assert found["within"][0][0] > found["across"][0][0]
    clusterings = [(each["unit"], each["count"]) for each in found["clusterings"]]
    assert clusterings == [("last", 5)]
    assert all(each["coverage"]["mean"] < 1 for each in found["clusterings"])


def test_the_folder_has_the_record_the_page_and_the_tables_and_no_model(place, whole):
    record, out = whole
    assert sorted(tree(out)) == ["ablation.json", "index.html", "table.md"]
    assert json.loads((out / "ablation.json").read_text()) == record
    page = (out / "index.html").read_text()
    assert page == render_ablation(record)
    for axis in AXES:
        assert f'<section id="{axis}">' in page
    assert (out / "table.md").read_text() == tables_in_markdown(record)
    assert list(out.parent.iterdir()) == [out]


def test_the_page_without_domains_and_with_many_clusterings(whole):
    record, _ = whole
    assert "How well the units separate" not in render_ablation(record | {"domains": None})
    (clustering,) = record["domains"]["clusterings"]
    many = [
        {**clustering, "unit": unit, "count": count} for unit in ("last", "all") for count in (5, 9)
    ]
    page = render_ablation(record | {"domains": record["domains"] | {"clusterings": many}})
    assert page.count("clustered by all") >= 2
    assert page.count("<polyline") == render_ablation(record).count("<polyline") + 2 * 2 * 2


@pytest.mark.parametrize("done", [0, 2, 5])
def test_an_interrupted_ablation_goes_on_to_the_same_end(place, whole, tmp_path, monkeypatch, done):
    _, expected = whole
    ablation, out = read_ablation(place / "varied.yml"), tmp_path / "out"
    merges = []

    def stopping(recipe, merged, **options):
        if len(merges) == done:
            merged.mkdir()  # half a model
            (merged / "model.safetensors").write_text("half")
            raise KeyboardInterrupt
        merges.append(recipe)
        return merge(recipe, merged, **options)

    monkeypatch.setattr(run_module.job, "merge", stopping)
    with pytest.raises(KeyboardInterrupt):
        ablate(ablation, out)
    assert not out.exists()
    (work,) = tmp_path.iterdir()
    with (work / "journal.jsonl").open("a") as journal:
        journal.write('{"name": "cut')  # by a kill
    again = []

    def counting(recipe, merged, **options):
        again.append(recipe)
        return merge(recipe, merged, **options)

    monkeypatch.setattr(run_module.job, "merge", counting)
    ablate(ablation, out, options=AblationOptions(resume=True))
    assert tree(out) == tree(expected) and len(merges) + len(again) == 6
    assert list(tmp_path.iterdir()) == [out]


def test_another_recipe_does_not_go_on(place, tmp_path, monkeypatch):
    ablation, out = read_ablation(place / "varied.yml"), tmp_path / "out"

    def full(*arguments, **options):
        raise StorageError("the disk is full")

    monkeypatch.setattr(run_module.job, "merge", full)
    with pytest.raises(StorageError, match="the disk is full"):
        ablate(ablation, out)
    other = ablation.model_copy(update={"ablate": {"count": (4,)}})
    with pytest.raises(InputError, match="the interrupted ablation had other recipe: go back"):
        ablate(other, out, options=AblationOptions(resume=True))
    assert (tmp_path / ".out.recall-work" / "journal.jsonl").stat().st_size > 0


@pytest.mark.parametrize("refused", [0.5, 1.0])
def test_a_variant_that_cannot_be_merged_is_told_and_the_recipes_own_ends_all(
    place, tmp_path, monkeypatch, refused
):
    def refusing(recipe, merged, **options):
        if recipe.samples is not None and recipe.parameters.temperature == refused:
            raise InputError("most samples are alike <there>")
        return merge(recipe, merged, **options)

    monkeypatch.setattr(run_module.job, "merge", refusing)
    ablation = read_ablation(place / "varied.yml")
    ablation = ablation.model_copy(update={"ablate": {"temperature": (0.5,)}})
    if refused == 1.0:
        with pytest.raises(InputError, match="most samples are alike"):
            ablate(ablation, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
        return
    record = ablate(ablation, tmp_path / "out")
    assert record["runs"]["temperature 0.5"] == {"error": "most samples are alike <there>"}
    page = (tmp_path / "out" / "index.html").read_text()
    assert "0.5: most samples are alike &lt;there&gt;" in page and "<there>" not in page


def test_the_command(place, whole, tmp_path, monkeypatch, recall):
    _, expected = whole
    monkeypatch.chdir(tmp_path)
    shutil.copy(place / "varied.yml", "varied.yml")
    done = recall("ablate", "varied.yml")
    assert done.status == 0, done.err
    assert "6 merges of 2 models, each evaluated on 24 rows of 2 tasks" in done.out
    assert "temperature" in done.out and "varied/index.html" in done.out
    assert tree(tmp_path / "varied") == tree(expected)
    again = recall("ablate", "varied.yml")
    assert again.status == 2
    assert again.err == "recall: varied exists: choose another folder or pass --force\n"
    values = yaml.safe_load((place / "varied.yml").read_text()) | {"ablate": ["rank"]}
    (tmp_path / "bad.yml").write_text(yaml.safe_dump(values))
    bad = recall("ablate", "bad.yml", "--out", "other")
    assert bad.status == 2 and bad.err.startswith("recall: bad.yml: ablate: no axis 'rank'")
    assert bad.err.count("\n") == 1 and not (tmp_path / "other").exists()
