"""The whole demo: its folder, its table, and the sums in it."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from recall_jax.errors import InputError
from recall_jax.evaluation.exact_match import exact_match_rate
from recall_jax.experiments.demo.material import (
    BASE,
    CHECKPOINTS,
    FINE_TUNED,
    TASKS,
    UNSEEN,
    held_out_file,
)
from recall_jax.experiments.demo.run import AVERAGE, RECALL, run_demo, score_table
from recall_jax.inputs.data import read_rows


def test_sums_of_a_table_worked_out_by_hand():
    def scores(*values):
        return dict(zip(TASKS, values, strict=True))

    table = score_table(
        {
            BASE: scores(0.5, 0.5, 0.5, 0.5, 0.5),
            "reverse": scores(1.0, 0.2, 0.1, 0.0, 0.6),
            "sort": scores(0.4, 0.9, 0.5, 0.5, 0.5),
            "shift": scores(0.0, 0.0, 1.0, 0.0, 0.0),
            RECALL: scores(0.8, 0.6, 0.7, 0.5, 0.9),
            AVERAGE: scores(0.0, 0.0, 0.0, 0.0, 0.0),
        },
        count=10,
    )
    assert FINE_TUNED == ("reverse", "sort", "shift")
    assert UNSEEN == ("swap", "rotate")
    own, others, unseen, forgetting = zip(*(row[-4:] for row in table.rows), strict=True)
    assert own == (None, 1.0, 0.9, 1.0, 0.7, 0.0)
    assert others == pytest.approx((0.5, 0.15, 0.45, 0.0, 0.7, 0.0))
    assert unseen == pytest.approx((0.5, 0.3, 0.5, 0.0, 0.7, 0.0))
    assert forgetting[0] is None
    assert forgetting[1:] == pytest.approx((1.2 / 5, 0.1 / 5, 2.0 / 5, 0.0, 2.5 / 5))


def test_the_demo_leaves_complete_models_and_a_report(demo_run):
    out, table = demo_run
    assert {path.name for path in out.iterdir()} == {
        RECALL,
        AVERAGE,
        "evaluation.json",
        "report.html",
    }
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["columns"] == list(table.columns)
    assert evaluation["rows"] == [list(row) for row in table.rows]
    page = (out / "report.html").read_text()
    assert table.caption in page
    report = json.loads((out / RECALL / "recall_report.json").read_text())
    assert len(report["models"]) == 4
    assert report["reference"] == 3
    for row in read_rows(out / RECALL / "typical.jsonl"):
        assert row["prompt"] + row["completion"] in page


def test_the_average_is_the_average(demo_run):
    out, _ = demo_run
    merged = load_file(out / AVERAGE / "model.safetensors")
    inputs = [load_file(CHECKPOINTS / n / "model.safetensors") for n in (BASE, *FINE_TUNED)]
    for name, tensor in merged.items():
        mean = np.mean([model[name].astype(np.float64) for model in inputs], axis=0)
        step = np.abs(mean) * 2.0**-8 + 1e-7
        assert np.all(np.abs(tensor.astype(np.float64) - mean) <= step)


def test_the_table_holds_what_each_model_scores(demo_run):
    out, table = demo_run
    assert [row[0] for row in table.rows] == [BASE, *FINE_TUNED, RECALL, AVERAGE]
    scores = {row[0]: dict(zip(TASKS, row[1:], strict=False)) for row in table.rows}
    for folder, task in ((CHECKPOINTS / BASE, "sort"), (out / RECALL, "rotate")):
        again = exact_match_rate(folder, read_rows(held_out_file(task)), batch_size=128)
        assert scores[folder.name][task] == pytest.approx(again)
    for task in FINE_TUNED:
        assert scores[task][task] > 0.9


def test_a_folder_that_exists_is_kept(tmp_path):
    (tmp_path / "note").touch()
    with pytest.raises(InputError, match="exists"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
