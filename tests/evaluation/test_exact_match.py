"""Exact match: what counts as right."""

from recall_jax.evaluation.exact_match import exact_match_rate, exact_matches
from recall_jax.experiments.demo.material import CHECKPOINTS, held_out_file
from recall_jax.inputs.data import read_rows

MODEL = CHECKPOINTS / "sort"
ROWS = read_rows(held_out_file("sort"))[:16]


def answered(rows):
    return exact_matches(MODEL, rows, batch_size=16).tolist()


def test_share_of_right_answers():
    right = answered(ROWS)
    wrong = [{**row, "completion": row["completion"][::-1]} for row in ROWS[:8]]
    assert sum(right[:8]) > 0
    assert answered([*wrong, *ROWS[8:]]) == [False] * 8 + right[8:]
    assert exact_match_rate(MODEL, [*wrong, *ROWS[8:]], batch_size=16) == sum(right[8:]) / 16


def test_an_answer_must_neither_stop_short_nor_go_on():
    place = answered(ROWS).index(True)
    row = ROWS[place]
    for completion in (row["completion"][:-1], row["completion"] + "z", ""):
        assert answered([{**row, "completion": completion}]) == [False]
