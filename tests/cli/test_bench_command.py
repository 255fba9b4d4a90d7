"""`recall bench similarity`: what it writes and says, and the values of what it compares with."""

import json
import xml.etree.ElementTree as ElementTree

import jax
import numpy as np
import pytest

from recall_jax.benchmark import libraries
from recall_jax.benchmark.baselines import NUMPY, SCIKIT_LEARN
from recall_jax.benchmark.cost import matmul_roof, operations
from recall_jax.benchmark.similarity import Shape, representations
from recall_jax.similarity import MEASURES
from recall_jax.similarity.matrix import similarity_matrix

QUICK_MEASURES = {"linear_cka", "rbf_cka", "procrustes_distance", "rsa", "mutual_knn"}


def test_a_quick_run(recall, tmp_path):
    out = tmp_path / "bench"
    command = ("bench", "similarity", "--quick", "--layers", "3", "--repeat", "1", "--out", out)
    done = recall(*command)
    assert done.status == 0 and done.err == "", done.err
    record = json.loads((out / "similarity.json").read_text())
    assert record["format"] == 1 and record["device"] and record["machine"] and record["date"]
    assert {"jax", "numpy", "python"} <= set(record["versions"])
    shapes = [(32, 16, 3), (64, 16, 3)]
    asked = {(measure, *shape) for measure in QUICK_MEASURES for shape in shapes}
    cases = record["cases"]
    assert {
        (case["measure"], *(case["shape"][name] for name in ("samples", "width", "layers")))
        for case in cases
    } == asked
    for case in cases:
        seconds = case["seconds"]
        assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"] and seconds["repeats"] == 1
        pairs = case["shape"]["layers"] ** 2
        assert case["pairs_per_second"] == pytest.approx(pairs / seconds["median"])
        rate = case["operations"] / seconds["median"]
        assert case["roof_fraction"] == pytest.approx(rate / record["roof"])
        assert case["measure"] in done.out
        others = {one["name"]: one for one in case["others"]}
        assert "numpy" in others and others.keys() <= {"numpy", "scikit-learn"}
        for one in others.values():
            assert one["error"] is None
            assert one["value"] == pytest.approx(case["value"], abs=1e-4)
            times = one["seconds"]["median"] / (seconds["median"] / pairs)
            assert one["times_slower"] == pytest.approx(times)
    drawn = ElementTree.parse(out / "similarity.svg").getroot()
    texts = {text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert texts >= QUICK_MEASURES and {"recall", "numpy", "scikit-learn"} <= texts
    absent = {line.partition(":")[0] for line in record["missing"]}
    assert all(line in done.out for line in record["missing"])
    assert "no comparison with scikit-learn" not in absent


@pytest.fixture(autouse=True)
def without_libraries_of_this_machine(monkeypatch):
    """Only what every test environment has is compared with."""
    kept = [one for one in libraries._ADAPTERS if one[0] in ("numpy", "scikit-learn")]
    monkeypatch.setattr(libraries, "_ADAPTERS", (*kept, ("ReSi", "no_such_package", dict)))


@pytest.mark.parametrize(("option", "value", "match"), [
    ("--samples", "0", "--samples 0: give whole numbers above 0"),
    ("--width", "16,x", "--width 16,x: give whole numbers"),
    ("--layers", "1.5", "--layers 1.5: give whole numbers"),
    ("--measure", "cka,ckb", "unknown measure 'ckb'"),
    ("--device", "abacus", "--device abacus: use cpu, gpu or tpu"),
    ("--repeat", "0", "--repeat"),
])  # fmt: skip
def test_wrong_input_is_one_line(option, value, match, recall, tmp_path):
    out = tmp_path / "bench"
    done = recall("bench", "similarity", "--quick", "--out", out, option, value)
    assert done.status == 2 and done.out == ""
    assert len(done.err.splitlines()) == 1 and match in done.err, done.err
    assert not out.exists()


def test_a_folder_that_exists_stays(recall, tmp_path):
    done = recall("bench", "similarity", "--quick", "--out", tmp_path)
    assert done.status == 2 and "exists" in done.err and not list(tmp_path.iterdir())


def test_samples_too_few_for_a_measure_are_said(recall, tmp_path):
    command = ("bench", "similarity", "--samples", "5", "--width", "8", "--layers", "1")
    done = recall(*command, "--measure", "mutual_knn", "--out", tmp_path / "bench")
    assert done.status == 2 and "k is 10" in done.err and len(done.err.splitlines()) == 1


def test_the_definitions_give_what_ours_give():
    assert NUMPY.keys() == MEASURES.keys() and SCIKIT_LEARN.keys() <= MEASURES.keys()
    (X,), (Y,) = representations(Shape(60, 24, 1))
    for name in MEASURES:
        ours = similarity_matrix(X[None], Y[None], measure=name)[0, 0]
        for table in (NUMPY, SCIKIT_LEARN):
            if name in table:
                np.testing.assert_allclose(table[name](X, Y), ours, rtol=2e-4, err_msg=name)


def test_every_measure_has_its_count_and_it_grows_with_the_work():
    for name in MEASURES:
        count = operations(name, 100, 64, 2)
        assert count > 0
        assert operations(name, 200, 64, 2) > count
        assert operations(name, 100, 128, 2) > count
        assert operations(name, 100, 64, 3) > count


def test_counts_of_products_are_those_of_xla():
    n, width = 64, 32
    X, Y = representations(Shape(n, width, 1))
    row_cosine = operations("row_cosine", n, width, 1)
    assert row_cosine == 2 * n * width
    counted = jax.jit(lambda X, Y: X @ X.T).lower(X[0], Y[0]).compile().cost_analysis()["flops"]
    kernels = operations("hsic", n, width, 1)
    assert kernels == 2 * counted + 2 * n * n


def test_the_roof_is_that_of_a_product_wide_enough_to_time():
    rate, width = matmul_roof(repeat=1)
    assert width >= 2048 and rate > 0
