import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.errors import InputError
from recall_jax.report.record import KEYS, load_report, validate_report, write_report


def test_round_trip_keeps_every_key_and_every_bit(make_report, tmp_path):
    report = make_report(passes=2, peak_memory_bytes=None)
    write_report(tmp_path / "report.json", report)
    loaded = load_report(tmp_path / "report.json")
    assert loaded == report
    assert tuple(loaded) == (*KEYS, "weight_rises_with_depth", "passes")


@given(
    value=st.floats(allow_nan=False, allow_infinity=False), size=st.integers(3, 6), data=st.data()
)
def test_numbers_are_not_rounded(make_report, tmp_path_factory, value, size, data):
    report = make_report(K=2, U=size)
    report["weights"][1][data.draw(st.integers(0, size - 1))] = value
    path = tmp_path_factory.getbasetemp() / "numbers.json"
    write_report(path, report)
    assert load_report(path)["weights"] == report["weights"]


def test_a_constant_merge_has_nulls_for_what_it_did_not_measure(constant_report, tmp_path):
    write_report(tmp_path / "report.json", constant_report)
    text = json.loads((tmp_path / "report.json").read_text())
    assert [key for key in KEYS if text[key] is None] == [
        "reference",
        "sigma",
        "similarity",
        "adjacent",
        "typical",
        "peak_memory_bytes",
    ]


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_required(make_report, tmp_path, key):
    report = make_report()
    del report[key]
    with pytest.raises(ValueError, match=f"key missing: {key}"):
        write_report(tmp_path / "report.json", report)
    assert not (tmp_path / "report.json").exists()


FAULTS = {
    "format": 2,
    "method": None,
    "models": [],
    "units": ["embed"] * 8,
    "reference": 4,
    "typical_samples": [2, 3, 3],
    "sigma": [1.0] * 7,
    "similarity": [[1.0] * 8] * 3,
    "weights": [[0.25] * 8] * 3 + [[0.25] * 7],
    "adjacent": [0.5] * 8,
    "typical": {"cluster_sizes": [1]},
    "warnings": [1],
    "settings": [],
    "timing_s": 1.0,
    "bytes": {"read": 1},
    "versions": "1.0",
}


@pytest.mark.parametrize("key", FAULTS)
def test_a_fault_is_named_by_its_key(make_report, key):
    with pytest.raises(ValueError, match=rf"^{key}\b"):
        validate_report(make_report(**{key: FAULTS[key]}))


def test_typical_samples_ascend(make_report):
    with pytest.raises(ValueError, match="ascending"):
        validate_report(make_report(typical_samples=[3, 2]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, True, None, "1", [1.0]])
def test_only_finite_numbers_are_weights(make_report, bad):
    report = make_report()
    report["weights"][2][5] = bad
    with pytest.raises(ValueError, match="weights holds"):
        validate_report(report)


@pytest.mark.parametrize("place", ["settings", "extra"])
def test_no_nan_reaches_the_file_by_another_key(make_report, tmp_path, place):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_report(tmp_path / "report.json", make_report(**{place: {"deep": [math.nan]}}))
    assert not (tmp_path / "report.json").exists()


def test_weights_of_an_earlier_run_need_only_four_keys(tmp_path):
    weights = {"format": 1, "models": ["a", "b"], "units": ["u"], "weights": [[1], [0.5]]}
    (tmp_path / "weights.json").write_text(json.dumps(weights))
    assert load_report(tmp_path / "weights.json") == weights


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ("[1, 2]", "a JSON object is needed"),
        ("{}", "key missing: format, models, units, weights"),
        ('{"format": 9, "models": ["a"], "units": ["u"], "weights": [[1]]}', "format is 9"),
        ('{"format": 1, "models": ["a"], "units": ["u"], "weights": [[NaN]]}', "NaN"),
        ('{"format": 1, "models": ["a"], "units": ["u"], "weights": [[1e999]]}', "infinite"),
        ('{"format": 1, "models": ["a"], "units": ["u"], "weights": [[1, 2]]}', "shape [1][1]"),
        ('{"format": 1, "models": ["a"], "units": ["u"], "weights": null}', "no weights"),
        ('{"format": 1, "models": "a", "units": ["u"], "weights": [[1]]}', "models must be"),
        ("\udc80", "decode"),
        ("[" * 100_000, "not a record"),
    ],
)
def test_a_wrong_file_gets_one_line(tmp_path, text, said):
    path = tmp_path / "weights.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError) as caught:
        load_report(path)
    message = str(caught.value)
    assert said in message
    assert message.startswith(str(path))
    assert "\n" not in message


def test_a_missing_file_gets_one_line(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: cannot be read \(No such file"):
        load_report(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be read"):
        load_report(tmp_path)
