"""What is shipped: size, data, models as transformers sees them, and what they can do."""

import json
from functools import cache

import pytest
import tokenizers

from recall_jax.evaluation.exact_match import exact_match_rate
from recall_jax.evaluation.strings import draw_distinct
from recall_jax.experiments.demo.material import (
    BASE,
    CHECKPOINTS,
    DATA,
    FINE_TUNED,
    TASKS,
    UNSEEN,
    held_out_file,
    training_file,
)
from recall_jax.experiments.demo.train import FINE_TUNING_ROWS, TEST_ROWS, VOCABULARY
from recall_jax.inputs.data import read_rows

MODELS = (BASE, *FINE_TUNED)


@cache
def scores(model):
    """Exact match by task, on a quarter of the shipped test rows."""
    return {
        task: exact_match_rate(CHECKPOINTS / model, read_rows(held_out_file(task))[:32], 32)
        for task in TASKS
    }


def test_three_tasks_are_fine_tuned_and_two_unseen():
    assert len(FINE_TUNED) == 3
    assert {*FINE_TUNED, *UNSEEN} == set(TASKS)


def test_everything_shipped_is_small():
    files = [path for folder in (CHECKPOINTS, DATA) for path in folder.rglob("*")]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 6_000_000


@pytest.mark.parametrize("task", FINE_TUNED)
def test_training_rows_are_those_of_the_seed(task):
    assert read_rows(training_file(task)) == draw_distinct(task, FINE_TUNING_ROWS, 0)


@pytest.mark.parametrize("task", TASKS)
def test_test_rows_are_held_out(task):
    assert read_rows(held_out_file(task)) == draw_distinct(task, TEST_ROWS, 0, held_out=True)


def test_base_half_knows_every_task():
    assert all(0.3 < score < 0.9 for score in scores(BASE).values())


@pytest.mark.parametrize("task", FINE_TUNED)
def test_fine_tune_masters_its_task_and_forgets(task):
    mine, before = scores(task), scores(BASE)
    assert mine[task] > 0.9
    assert all(mine[other] < before[other] for other in TASKS if other != task)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("model", MODELS)
def test_transformers_loads_the_model_and_answers_the_same(model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, task = CHECKPOINTS / model, FINE_TUNED[0]
    rows = read_rows(held_out_file(task))[:32]
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert network.num_parameters() < 1_000_000
    inputs = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    decoded = network.generate(**inputs, max_new_tokens=10)[:, inputs["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(decoded, skip_special_tokens=True)
    right = [answer == row["completion"] for answer, row in zip(answers, rows, strict=True)]
    assert sum(right) / len(rows) == scores(model)[task]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transformers_and_tokenizers_give_the_same_ids():
    from transformers import AutoTokenizer

    folder = CHECKPOINTS / BASE
    theirs = AutoTokenizer.from_pretrained(folder)
    light = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    shipped = [row["prompt"] + row["completion"] for row in read_rows(training_file("sort"))[:50]]
    texts = [*shipped, "xsort ab=swap", "An été,\n 12  <|endoftext|>x", "e\u0301 reverse reverse"]
    for text in texts:
        ids = light.encode(text).ids
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=False) == light.decode(
            ids, skip_special_tokens=False
        )
    assert len(light.encode(shipped[0]).ids) == len(shipped[0]) - len("sort")
    assert theirs.eos_token_id == theirs.pad_token_id == VOCABULARY.index("<|endoftext|>")
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] == theirs.eos_token_id
    assert config["vocab_size"] == len(theirs) == light.get_vocab_size()
