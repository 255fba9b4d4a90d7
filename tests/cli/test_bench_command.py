"""`recall bench similarity`: what it writes, and what it says."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from recall_jax.similarity import plain

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
    assert record["missing"] == []


def test_without_scikit_learn_ours_is_timed_beside_numpy(recall, tmp_path, monkeypatch):
    monkeypatch.setattr(plain, "find_spec", lambda name: None if name == "sklearn" else name)
    out = tmp_path / "bench"
    sizes = ("--samples", "32", "--width", "16", "--layers", "1", "--repeat", "1")
    done = recall("bench", "similarity", *sizes, "--measure", "rbf_cka,gulp", "--out", out)
    record = json.loads((out / "similarity.json").read_text())
    assert record["missing"] == ["no comparison with scikit-learn: not installed"]
    assert record["missing"][0] in done.out
    beside = {case["measure"]: [one["name"] for one in case["others"]] for case in record["cases"]}
    assert beside == {"rbf_cka": ["numpy"], "gulp": []}


@pytest.mark.parametrize(("option", "value", "match"), [
    ("--samples", "0", "--samples 0: give positive integers"),
    ("--width", "16,x", "--width 16,x: give positive integers"),
    ("--layers", "1.5", "--layers 1.5: give positive integers"),
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
