"""`recall similarity`: its files hold what the measures give, and a wrong input is one line."""

import csv
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from toys import SIZES, UNITS, make_tokenizer, tree

from recall_jax import similarity
from recall_jax.similarity.measures import MEASURES

DRAW = np.random.default_rng(0)
REPS = DRAW.standard_normal((2, 5, 12, 6)).astype(np.float32)
VIT, GPT = DRAW.standard_normal((3, 12, 7)), DRAW.standard_normal((4, 12, 5)).astype(np.float16)
LAST = DRAW.standard_normal((12, 7)).astype(np.float32)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def study(recall, here):
    """Run the command into a folder; what it printed, its matrices and its record."""

    def run(*arguments, out="out"):
        done = recall("similarity", *arguments, "--out", out)
        assert done.status == 0, done.err
        with np.load(Path(out, "similarity.npz")) as file:
            arrays = dict(file)
        return done, arrays, json.loads(Path(out, "similarity.json").read_text())

    return run


def read_csv(path):
    with Path(path).open(newline="", encoding="utf-8") as file:
        (corner, *columns), *rows = csv.reader(file)
    assert corner == ""
    return columns, [row[0] for row in rows], np.asarray([row[1:] for row in rows], np.float64)


def test_files_hold_what_the_measures_give(recall, toys, study):
    measures = "rbf,cka,mutual_knn(k=5),procrustes_distance"
    flags = ["--measure", measures]
    done, arrays, record = study(*toys.llama, "--data", toys.data, *flags)
    assert recall("extract", *toys.llama, "--data", toys.data, "--out", "reps.npz").status == 0
    with np.load("reps.npz") as file:
        reps = file["reps"]
    sides = reps.reshape(-1, *reps.shape[2:])
    width = [np.sqrt(np.median(np.square(X[:, None] - X)[np.triu_indices(40, 1)].sum(-1)) / 2)
             for X in sides]  # fmt: skip
    direct = {
        "paired_rbf": lambda a, b: similarity.paired_rbf(sides[a], sides[b], width[a]),
        "linear_cka": lambda a, b: similarity.linear_cka(sides[a], sides[b]),
        "mutual_knn(k=5)": lambda a, b: similarity.mutual_knn(sides[a], sides[b], k=5),
        "procrustes_distance": lambda a, b: similarity.procrustes_distance(sides[a], sides[b]),
    }
    labels = [f"{model}:{unit}" for model in toys.llama for unit in UNITS]
    assert record["format"] == 1 and record["sides"] == labels and record["warnings"] == []
    assert record["rows"] == arrays["rows"].tolist() == list(range(40))
    assert [model["name"] for model in record["models"]] == toys.llama == list(arrays["models"])
    assert list(arrays["side_unit"]) == list(UNITS) * 2
    assert arrays["side_model"].tolist() == [0] * 5 + [1] * 5
    assert [entry["measure"] for entry in record["measures"]] == list(direct)
    for entry, (label, measure) in zip(record["measures"], direct.items(), strict=True):
        matrix = arrays[label]
        for a, b in [(0, 0), (1, 7), (7, 1), (3, 4), (9, 2)]:
            np.testing.assert_allclose(matrix[a, b], measure(a, b), rtol=1e-5, atol=1e-3 * (a == b))
        columns, rows, values = read_csv(f"out/{entry['file']}.csv")
        assert columns == rows == labels
        np.testing.assert_array_equal(values, matrix)
        # the curves of the record are entries of the matrix, the head left out
        assert entry["adjacent"] == [[matrix[k + u, k + u + 1] for u in range(3)] for k in (0, 5)]
        (curve,) = entry["same_depth"]
        assert curve["models"] == [1, 0] and curve["units"] == list(UNITS[:-1])
        assert curve["values"] == [matrix[5 + u, u] for u in range(4)]
        picture = ElementTree.parse(f"out/{entry['file']}.svg").getroot()
        assert picture.tag == "{http://www.w3.org/2000/svg}svg"
        assert entry["name"] in done.out and entry["seconds"] > 0
        for u, unit in enumerate(UNITS):  # the printed table: the last model with the first
            assert re.search(rf"{unit} +{matrix[5 + u, u]:.4f}", done.out)
    assert "out/index.html" in done.out and {"jax", "python"} <= set(record["versions"])
    assert record["settings"]["measures"] == measures
    # representations made before give the same, and without --out the same is printed
    again, stored, _ = study("--reps", "reps.npz", *flags, out="stored")
    assert all((stored[name] == arrays[name]).all() for name in arrays)
    assert again.out == done.out.replace("out/index", "stored/index")
    printed = recall("similarity", "--reps", "reps.npz", *flags)
    assert printed.out == again.out[: again.out.index("every pair")] and printed.status == 0


def test_models_of_other_architecture_read_the_same_rows(toys, study, tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 1, "hidden_size": 16}, head_dim=4)
    LlamaForCausalLM(config).save_pretrained("small")
    make_tokenizer().save_pretrained("small")
    flags = ["--data", toys.data, "--pool", "20", "--measure", "cka"]
    done, arrays, record = study("small", toys.qwen2[0], toys.llama[0], *flags)
    assert [(model["width"], len(model["units"])) for model in record["models"]] == [
        (16, 3), (32, 5), (32, 5)
    ]  # fmt: skip
    assert arrays["linear_cka"].shape == (13, 13) and len(record["rows"]) == 20
    # each is what it is alone
    for place, model in ((slice(0, 3), "small"), (slice(3, 8), toys.qwen2[0])):
        _, alone, _ = study(model, *flags, out=f"only{place.start}")
        np.testing.assert_allclose(
            arrays["linear_cka"][place, place], alone["linear_cka"], rtol=1e-5, atol=1e-6
        )
        assert alone["rows"].tolist() == record["rows"]
    shallow = record["measures"][0]["same_depth"][0]
    assert shallow["models"] == [1, 0]
    assert shallow["units"] == list(UNITS[:-1])
    assert shallow["matches"] == ["embed", "embed", "layers.0", "layers.0"]
    falls = record["measures"][0]["observations"]["falls_with_depth"]
    assert [entry["seen"] is None for entry in falls] == [True, True, False]
    assert all(unit in done.out for unit in UNITS)


def test_one_model_is_compared_with_itself(recall, toys, study):
    done, arrays, record = study(toys.llama[0], "--data", toys.data, "--measure", "cka")
    assert record["measures"][0]["same_depth"] == []
    for u in range(3):
        row = rf"{UNITS[u]} +{UNITS[u + 1]} +{arrays['linear_cka'][u, u + 1]:.4f}"
        assert re.search(row, done.out)


def test_arrays_made_elsewhere(study):
    np.savez("made.npz", vit=VIT, gpt=GPT, last=LAST)
    done, arrays, record = study("--reps", "made.npz", "--measure", "cka,debiased_linear_cka")
    sides = [*VIT.astype(np.float32), *GPT.astype(np.float32), LAST]
    labels = [*(f"vit:{u}" for u in range(3)), *(f"gpt:{u}" for u in range(4)), "last:0"]
    assert record["sides"] == labels and list(arrays["models"]) == ["vit", "gpt", "last"]
    for label in ("linear_cka", "debiased_linear_cka"):
        measure = getattr(similarity, label)
        expected = [[float(measure(X, Y)) for Y in sides] for X in sides]
        np.testing.assert_allclose(arrays[label], expected, atol=2e-5)
    assert "last" in done.out


@pytest.mark.parametrize("names", [{}, {"units": list("abcde"), "models": ["m", "m"]}])
def test_representations_stacked_elsewhere(names, study):
    np.savez("made.npz", reps=REPS.astype(np.float64), **names)
    _, arrays, record = study("--reps", "made.npz", "--measure", "cosine")
    models = ["m (1)", "m (2)"] if names else ["model 0", "model 1"]
    assert list(arrays["models"]) == models
    assert record["models"][0]["units"] == names.get("units", list("01234"))
    X, Y = REPS[0, 1], REPS[1, 4]
    cosine = (X * Y).sum(1) / np.linalg.norm(X, axis=1) / np.linalg.norm(Y, axis=1)
    assert arrays["row_cosine"][1, 9] == pytest.approx(cosine.mean(), abs=1e-6)


LAYERS = {
    "all": UNITS,
    "last": UNITS[3:4],
    "0,2": (UNITS[1], UNITS[3]),
    "head, embed": (UNITS[0], UNITS[4]),
    "1-2,layers.1,last": UNITS[2:4],
}


@pytest.mark.parametrize("layers", LAYERS)
def test_layers(layers, study):
    np.savez("made.npz", reps=REPS, units=UNITS)
    _, arrays, record = study("--reps", "made.npz", "--layers", layers, "--measure", "cosine")
    assert tuple(record["models"][1]["units"]) == tuple(LAYERS[layers])
    assert record["models"][1]["all_units"] is (layers == "all")
    _, whole, _ = study("--reps", "made.npz", "--measure", "cosine", out="whole")
    places = [UNITS.index(unit) + 5 * k for k in (0, 1) for unit in LAYERS[layers]]
    np.testing.assert_array_equal(arrays["row_cosine"], whole["row_cosine"][places][:, places])


def test_blocks_of_rows_change_no_value(study):
    np.savez("made.npz", reps=REPS)
    flags = ["--reps", "made.npz", "--measure", "rbf,mutual_knn(k=3)"]
    _, whole, _ = study(*flags)
    _, blocks, _ = study(*flags, "--block-size", "5", out="blocks")
    for label in ("paired_rbf", "mutual_knn(k=3)"):
        np.testing.assert_allclose(blocks[label], whole[label], atol=1e-6)


def test_all_measures_but_those_that_do_not_fit(recall, here, monkeypatch):
    some = {name: MEASURES[name] for name in ("paired_rbf", "linear_cka", "mutual_knn")}
    monkeypatch.setattr("recall_jax.similarity.choice.MEASURES", some)
    np.savez("made.npz", wide=VIT[0, :9], narrow=GPT[0, :9])
    done = recall("similarity", "--reps", "made.npz", "--measure", "all", "--out", "out")
    assert done.status == 0
    assert re.search("left out paired_rbf.*wide has 7, narrow 5", done.err)
    assert re.search("left out mutual_knn.*k is 10", done.err)
    record = json.loads(Path("out/similarity.json").read_text())
    assert [entry["name"] for entry in record["measures"]] == ["linear_cka"]
    assert len(record["warnings"]) == 2


def test_a_unit_without_variance_is_told_of(recall, here):
    reps = REPS.copy()
    reps[1, 2] = 3.0
    np.savez("made.npz", reps=reps)
    done = recall("similarity", "--reps", "made.npz", "--measure", "cka,rbf", "--out", "out")
    assert done.status == 0
    assert re.fullmatch("warning: model 1 has the same state for every row in 2: .*\n", done.err)
    with np.load("out/similarity.npz") as file:
        assert np.isfinite(file["linear_cka"]).all() and np.isfinite(file["paired_rbf"]).all()
        assert (file["linear_cka"][7] == 0).all()


def test_an_output_is_replaced_only_when_forced(recall, here):
    np.savez("made.npz", reps=REPS)
    line = ["similarity", "--reps", "made.npz", "--measure", "cosine", "--out", "out"]
    Path("out").mkdir()
    Path("out/precious").write_text("")
    done = recall(*line)
    assert done.status == 2 and "--force" in done.err
    assert [path.name for path in Path("out").iterdir()] == ["precious"]
    assert recall(*line, "--force", "--quiet").out == ""
    assert {path.name for path in Path("out").iterdir()} == {
        "index.html", "row_cosine.csv", "row_cosine.svg", "similarity.json", "similarity.npz"
    }  # fmt: skip


def test_measures_are_listed(recall):
    done = recall("similarity", "--list")
    assert done.status == 0
    lines = done.out.splitlines()
    for name, measure in MEASURES.items():
        (place,) = [i for i, line in enumerate(lines) if re.match(rf"{name}\b[^_]", line)]
        assert all(option in lines[place] for option in measure.options)
        assert ("distance" in lines[place].partition(": ")[2]) is measure.distance
        assert lines[place + 1].strip() in measure.function.__doc__


FILES = {
    "not there": (None, "cannot read made.npz"),
    "text": ("reps", "not a zip file"),
    "empty": ({}, "holds no arrays"),
    "objects": ({"a": np.asarray([{}, {}])}, "no number"),
    "names": ({"a": np.asarray(["x", "y"])}, "made.npz: a is <U1.*numbers"),
    "of one dimension": ({"a": np.zeros(4)}, r"a is float64 \(4,\).*\(n, E\)"),
    "without samples": ({"a": np.zeros((0, 4))}, r"a is float64 \(0, 4\)"),
    "complex": ({"a": np.zeros((4, 4), complex)}, "a is complex128"),
    "NaN": ({"a": LAST, "b": np.full((12, 2), np.nan)}, "made.npz: b holds.*not finite"),
    "beyond float32": ({"a": np.full((12, 2), 1e300)}, "a holds.*not finite in float32"),
    "other samples": ({"a": LAST, "b": LAST[:5]}, "b has 5 samples and a 12"),
    "rows of another number": ({"a": LAST, "rows": np.arange(3)}, "rows is int64.*12 rows"),
    "units of another number": ({"reps": REPS, "units": ["a"]}, "units is <U1.*5 names"),
    "units of one name": ({"reps": REPS, "units": ["a"] * 5}, "same name"),
    "more beside reps": ({"reps": REPS, "more": LAST}, "holds more besides reps"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_holds_no_representations(case, recall, here):
    content, match = FILES[case]
    if isinstance(content, str):
        Path("made.npz").write_text(content)
    elif content is not None:
        np.savez("made.npz", **content)
    refuse(recall, here, "--reps", "made.npz", "--measure", "cka", match=match)


WORDS = {
    "an unknown measure": (["--measure", "ckaa"], "unknown measure 'ckaa'.*procrustes_distance"),
    "an unknown option": (["--measure", "cka(k=5)"], "linear_cka has no option 'k'"),
    "a value that is none": (["--measure", "mutual_knn(k=0)"], "mutual_knn: k is 0"),
    "more neighbours than rows": (["--measure", "mutual_knn(k=12)"], "mutual_knn.*k=12.*12"),
    "an unknown unit": (["--layers", "embed"], "model 0 has no unit 'embed', only 0, 1"),
    "a layer beyond": (["--layers", "3-9"], "--layers '3-9': model 0 has no unit '5'"),
    "a layer of many digits": (["--layers", "9" * 5000], r"model 0 has no unit '9+\.\.\.9+', only"),
    "a range without end": (["--layers", f"0-{10**8}"], "model 0 has no unit"),
    "a range backwards": (["--layers", "3-1"], "lower number first"),
    "no layer": (["--layers", ""], "has no unit ''"),
    "a block of none": (["--block-size", "0"], "block-size"),
    "an output that holds its input": (["--out", "."], "current folder|input|exists"),
}  # fmt: skip


@pytest.mark.parametrize("case", WORDS)
def test_words_that_are_refused(case, recall, here):
    np.savez("made.npz", reps=REPS)
    words, match = WORDS[case]
    refuse(recall, here, "--reps", "made.npz", *words, match=match)


def test_a_measure_of_one_width_names_the_models(recall, here):
    np.savez("made.npz", vit=VIT, gpt=GPT)
    match = "measure paired_rbf: .*one width, and vit has 7, gpt 5"
    refuse(recall, here, "--reps", "made.npz", "--measure", "cka,rbf", match=match)


def refuse(recall, here, *arguments, match):
    before = tree(here)
    done = recall("similarity", "--out", "out", *arguments)
    assert (done.status, done.out) == (2, "")
    assert re.fullmatch(r"recall: [^\n]+\n", done.err), done.err
    assert re.search(match, done.err), done.err
    assert tree(here) == before
