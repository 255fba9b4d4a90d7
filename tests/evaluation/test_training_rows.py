"""Rows to learn from: the prompts of the evaluation, and the answers that it takes for right."""

import pytest
from published import MEDMCQA, RACE, SQUAD, SST2, write_parquet

from recall_jax.errors import InputError
from recall_jax.evaluation.examples import make_examples
from recall_jax.evaluation.metrics import normalise_answer
from recall_jax.evaluation.rows import load_rows
from recall_jax.evaluation.task import find_task
from recall_jax.evaluation.training_rows import training_rows, with_split
from recall_jax.inputs.data import read_rows


@pytest.fixture
def root(tmp_path):
    for task, rows in {"sst2": SST2, "squad_v2": SQUAD, "race": RACE, "medmcqa": MEDMCQA}.items():
        write_parquet(tmp_path / "data" / task / "train-00000-of-00001.parquet", task, rows)
    return tmp_path / "data"


def rows_of(name, root):
    task = with_split(find_task(name), "train")
    return training_rows(task, make_examples(task, load_rows(task, root)))


def test_answers_follow_the_prompts_that_are_evaluated(root):
    sst2, squad, race = (rows_of(name, root) for name in ("sst2", "squad_v2", "race"))
    assert sst2[0]["prompt"].endswith("\nSentiment:")
    assert [row["completion"] for row in sst2] == [" positive", " negative"] * 2
    assert [row["completion"] for row in squad] == [" 1871", " unanswerable", " the ships"]
    assert [row["completion"] for row in race] == [" a boat", " By water.", " red"]
    assert [row["completion"] for row in rows_of("medmcqa", root)] == [" C", " A"]
    # what is learnt there counts as no answer
    assert normalise_answer(squad[1]["completion"]) == "unanswerable"


def test_a_text_is_learnt_whole():
    task = find_task("text_topics")
    examples = make_examples(task, load_rows(task, None).draw(2, 0))
    assert training_rows(task, examples) == [{"text": example.prompt} for example in examples]


def test_rows_that_are_evaluated_are_never_learnt():
    with pytest.raises(InputError, match="sst2 is evaluated on split 'validation': learn from"):
        with_split(find_task("sst2"), "validation")
    with pytest.raises(InputError, match="no split 'dev': choose from train, validation"):
        with_split(find_task("sst2"), "dev")
    with pytest.raises(InputError, match="strings_sort has no splits, and its rows are held out"):
        with_split(find_task("strings_sort"), "train")


def test_the_command_writes_a_file_for_finetune(recall, root, tmp_path):
    out = tmp_path / "sst2.jsonl"
    done = recall("rows", "sst2", "--data-root", root, "--limit", "3", "--out", out)
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("3 of 4 rows of ")
    assert len(read_rows(out)) == 3
    again = recall("rows", "sst2", "--data-root", root, "--out", out)
    assert (again.status, again.err.count("\n")) == (2, 1)
