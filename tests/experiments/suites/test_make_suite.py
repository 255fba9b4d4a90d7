"""Suites far smaller than the real ones: what is made, made again, gone on with and refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError
from toys import tree

from recall_jax.errors import InputError
from recall_jax.evaluation.examples import Example
from recall_jax.evaluation.metrics import text_estimates
from recall_jax.evaluation.resident import load_resident
from recall_jax.evaluation.scoring import score
from recall_jax.evaluation.strings import is_held_out_string
from recall_jax.evaluation.task import Task, find_task
from recall_jax.experiments.demo.material import BASE, CHECKPOINTS
from recall_jax.experiments.suites import suite as suite_module
from recall_jax.experiments.suites.strings import strings_suite
from recall_jax.experiments.suites.suite import Stage, make_suite
from recall_jax.experiments.suites.text import text_suite
from recall_jax.inputs.data import read_rows
from recall_jax.jobs.evaluate import EvaluateOptions, evaluate

TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SHORT = {"base": Stage(24, 1, 8, 1e-2), "fine_tune": Stage(16, 1, 8, 1e-2)}
TIMED = {"training.json", "README.md", "checksums.json"}


def strings(seed=0):
    return replace(strings_suite(seed), sizes=TINY | {"max_position_embeddings": 64}, **SHORT)


def untimed(folder):
    return {name: data for name, data in tree(folder).items() if name.split("/")[-1] not in TIMED}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("suites") / "strings"
    return out, make_suite(strings(), out, ["reverse"])


def test_a_suite_holds_its_models_rows_and_record(made):
    out, record = made
    assert json.loads((out / "suite.json").read_text()) == record
    assert {path.name for path in out.iterdir()} == {
        "suite.json",
        "data",
        "start",
        "base",
        "reverse",
    }
    for task in record["tasks"]:
        rows, held_out = (read_rows(out / f"data/{task}.{s}.jsonl") for s in ("train", "test"))
        assert (len(rows), len(held_out)) == (16, 256)
        assert {row["prompt"].split(" ")[0] for row in [*rows, *held_out]} == {task}
        assert not {row["prompt"] for row in rows} & {row["prompt"] for row in held_out}
    mixed = [row["prompt"].split(" ") for row in read_rows(out / "data/base.train.jsonl")]
    assert {task for task, _ in mixed} <= set(record["tasks"])
    assert not any(is_held_out_string(text.removesuffix("=")) for _, text in mixed)
    training = json.loads((out / "reverse" / "training.json").read_text())
    assert training["model"] == str(out / "base")
    assert training["steps"] == 2


def test_an_interrupted_suite_goes_on_to_the_same_bytes(made, tmp_path, monkeypatch):
    def stopped(model, out, *rest, **options):
        if out.name == "reverse":
            raise KeyboardInterrupt
        return finetune(model, out, *rest, **options)

    finetune = suite_module.finetune
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(suite_module, "finetune", stopped)
        make_suite(strings(), tmp_path / "out", ["reverse"])
    lines = []
    make_suite(strings(), tmp_path / "out", ["reverse"], announce=lines.append)
    assert lines[0] == "base: kept" and lines[1].startswith("reverse: 2 steps, loss ")
    assert untimed(tmp_path / "out") == untimed(made[0])


def test_another_suite_is_neither_mixed_in_nor_replaced(made, tmp_path):
    out, _ = made
    with pytest.raises(InputError, match="holds a suite with seed 0, not 1: choose another folder"):
        make_suite(strings(1), out)
    with pytest.raises(InputError, match="suite strings has no task 'count': choose from reverse"):
        make_suite(strings(), out, ["count"])
    with pytest.raises(InputError, match="exists: choose another folder or pass --force"):
        make_suite(strings(), tmp_path)


def test_a_suite_that_does_not_exist_is_one_line(recall, tmp_path):
    done = recall("suite", "numbers", "--out", tmp_path / "out")
    assert (done.status, done.err) == (2, "recall: no suite 'numbers': choose strings or text\n")
    assert not list(tmp_path.iterdir())


def test_a_suite_of_text_says_which_text(tmp_path, monkeypatch):
    done = {"losses": [2.0, 1.0], "timing_s": {"training": 3}}
    trained = []
    monkeypatch.setattr(suite_module, "finetune", lambda *at, **_: trained.append(at) or done)
    longest = text_suite(0).sizes["max_position_embeddings"]
    sizes = TINY | {"max_position_embeddings": longest}
    suite = replace(text_suite(0), tasks=("topics", "names"), sizes=sizes, **SHORT)
    record = make_suite(suite, tmp_path / "text")
    assert [(model, out.name) for model, out, _ in trained] == [
        (str(tmp_path / "text" / "start"), "base"),
        (str(tmp_path / "text" / "base"), "topics"),
        (str(tmp_path / "text" / "base"), "names"),
    ]
    assert set(record["rows"]["documents"]) == {"topics", "names"}
    assert all(len(digest) == 64 for digest in record["rows"]["documents"]["topics"].values())
    rows = read_rows(tmp_path / "text" / "data" / "base.train.jsonl")
    assert len(rows) == 24 and len({row["text"] for row in rows}) == 24
    # every passage fits: its bytes, the end of the text before it and its own
    assert max(len(row["text"].encode()) for row in rows) + 2 <= longest
    network = load_resident(tmp_path / "text" / "start")
    ids = network.tokenizer.encode("aé", 9, True)
    assert len(ids) == 4 and ids[0] == network.eos_token_ids[0]
    assert network.tokenizer.decode(ids) == "aé"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_perplexity_is_that_of_transformers(made, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = made[0] / "base"
    tasks = [find_task("text_topics"), find_task("text_names")]
    options = EvaluateOptions(limit=4, batch_size=4)
    record = evaluate([str(model)], tasks, tmp_path / "seen", options=options)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for task in tasks:
        rows = read_rows(tmp_path / "seen" / "predictions" / "0-base" / f"{task.task}.jsonl")
        expected = []
        for row in rows:
            ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
            count = ids.shape[1] - 1
            # windows of 64 tokens, as many as the model is made for; the last reaches back
            nats = 0.0
            for start in range(1, count + 1, 64):
                end = min(start + 64, count + 1)
                first = max(0, end - 65)
                with torch.no_grad():
                    scores = network(ids[:, first : end - 1]).logits[0].log_softmax(-1)
                wanted = scores[start - first - 1 :].gather(1, ids[0, start:end, None])
                nats -= wanted.sum().item()
            assert row["nats"] == pytest.approx(nats, rel=1e-5)
            size = len(row["prompt"].encode())
            assert (row["tokens"], row["bytes"]) == (count, size)
            expected.append((nats, count, size))
        nats, count, size = np.sum(expected, axis=0)
        found = record["results"][0][task.task]
        assert found["perplexity"]["value"] == pytest.approx(np.exp(nats / count), rel=1e-5)
        bits = nats / np.log(2) / size
        assert found["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)
    page = (tmp_path / "seen" / "index.html").read_text()
    assert "bits per byte" in page and "first metric" not in page


def test_standard_errors_of_texts_are_those_of_the_delta_method():
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 200, 400)
    nats = tokens * rng.normal(2.0, 0.3, 400)
    found = text_estimates(nats, tokens, 2 * tokens)
    draws = rng.integers(400, size=(2000, 400))
    means = nats[draws].sum(axis=1) / tokens[draws].sum(axis=1)
    for name, samples in (("perplexity", np.exp(means)), ("bits_per_byte", means / 2 / np.log(2))):
        assert found[name].standard_error == pytest.approx(samples.std(), rel=0.06)
    assert text_estimates([3.0], [2], [1])["perplexity"] == (np.exp(1.5), None, 1)
    hopeless = text_estimates([9e3, 8e3], [2, 2], [1, 1])["perplexity"]
    assert np.isfinite(hopeless[:2]).all() and hopeless.value > 1e300


def test_a_text_is_asked_for_nothing_else():
    task = find_task("text_names").model_dump(exclude_none=True)
    with pytest.raises(ValidationError, match="scoring by perplexity takes the prompt alone"):
        Task.model_validate(task | {"references": "text", "metrics": ["bleu"]})
    with pytest.raises(InputError, match=r"row 7 \(from 0\): its text has no tokens"):
        score(
            find_task("text_names"),
            [Example(7, "")],
            load_resident(CHECKPOINTS / BASE),
            batch_size=1,
        )
