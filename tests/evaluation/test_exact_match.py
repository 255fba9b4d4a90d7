"""Exact match: what counts as right, and where the end of text is read."""

import json
import shutil

import pytest

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.demo.material import BASE, CHECKPOINTS, held_out_file
from recall_jax.errors import InputError
from recall_jax.evaluation.exact_match import end_of_text, exact_match, exact_matches
from recall_jax.representations.data import read_rows

MODEL = CHECKPOINTS / "sort"
ROWS = read_rows(held_out_file("sort"))[:16]


def answered(rows):
    return exact_matches(MODEL, rows, batch_size=16).tolist()


def test_share_of_right_answers():
    right = answered(ROWS)
    wrong = [{**row, "completion": row["completion"][::-1]} for row in ROWS[:8]]
    assert sum(right[:8]) > 0
    assert answered([*wrong, *ROWS[8:]]) == [False] * 8 + right[8:]
    assert exact_match(MODEL, [*wrong, *ROWS[8:]], batch_size=16) == sum(right[8:]) / 16


def test_an_answer_must_neither_stop_short_nor_go_on():
    place = answered(ROWS).index(True)
    row = ROWS[place]
    for completion in (row["completion"][:-1], row["completion"] + "z", ""):
        assert answered([{**row, "completion": completion}]) == [False]


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(CHECKPOINTS / BASE, tmp_path / "model")
    return tmp_path / "model"


def edit(folder, name, **values):
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | values))


def test_the_generation_config_says_where_a_text_ends(copy):
    edit(copy, "generation_config.json", eos_token_id=[3, 5])
    assert end_of_text(open_checkpoint(copy)) == [3, 5]
    (copy / "generation_config.json").unlink()
    assert end_of_text(open_checkpoint(copy)) == [256]
    edit(copy, "config.json", eos_token_id=None)
    with pytest.raises(InputError, match="eos_token_id"):
        end_of_text(open_checkpoint(copy))


def test_tensors_that_do_not_fit_the_config_are_refused(copy):
    edit(copy, "config.json", intermediate_size=200)
    with pytest.raises(InputError, match=r"mlp\.gate_proj"):
        exact_match(copy, ROWS)
