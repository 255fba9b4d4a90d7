"""An evaluation from end to end: the table, the files, the answers kept, and going on."""

import io
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import sacrebleu
import tokenizers
import yaml
from published import DATA
from toys import copy_model, tree

import recall_jax.jobs.evaluate as evaluate_module
from recall_jax.cli.main import main
from recall_jax.errors import InputError, UnfinishedError
from recall_jax.evaluation import lengths, scoring
from recall_jax.evaluation.examples import Example, make_examples
from recall_jax.evaluation.journal import EvaluationJournal, resume_evaluation_journal
from recall_jax.evaluation.lengths import check_memory, count_too_long
from recall_jax.evaluation.likelihood import log_likelihoods
from recall_jax.evaluation.metrics import Estimate, squad_f1
from recall_jax.evaluation.resident import load_resident, with_weights
from recall_jax.evaluation.rows import load_rows
from recall_jax.evaluation.scoring import score, split_tokens
from recall_jax.evaluation.task import Task, find_task
from recall_jax.experiments.demo.material import BASE, CHECKPOINTS
from recall_jax.generation.generate import generate
from recall_jax.generation.prompt_tokens import encode_prompt
from recall_jax.jobs.evaluate import EvaluateOptions, evaluate

SHORT = {"by": "generation", "max_new_tokens": 6, "stop": ["e", "\n"], "no_answer": "unanswerable"}


def changed(name, **changes):
    """A task of the package with some keys changed."""
    values = find_task(name).model_dump(exclude_none=True) | changes
    return Task.model_validate(values)


SQUAD = changed("squad_v2", scoring=SHORT)
OPTIONS = EvaluateOptions(data_root=DATA, batch_size=4)


@pytest.fixture(scope="module")
def models(toys, tmp_path_factory):
    """Two of different families, which know the end of a text."""
    folder = tmp_path_factory.mktemp("models")
    sources = {"qwen": toys.qwen2[0], "llama": toys.llama[0]}
    config = {"eos_token_id": 1, "max_position_embeddings": 1024}
    return [str(copy_model(s, folder / name, **config)) for name, s in sources.items()]


@pytest.fixture(scope="module")
def evaluated(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated") / "out"
    return models, evaluate(models, [find_task("sst2"), SQUAD], out, options=OPTIONS), out


def predictions(out, model, task):
    (path,) = (out / "predictions").glob(f"{model}-*/{task}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_table_is_what_direct_calls_give(evaluated):
    models, record, out = evaluated
    examples = make_examples(find_task("sst2"), load_rows(find_task("sst2"), DATA))
    for index, model in enumerate(models):
        resident = load_resident(model)
        chosen = []
        for place, example in enumerate(examples):
            pairs = [split_tokens(resident.tokenizer, example.prompt, c) for c in example.choices]
            sums, _, counts = log_likelihoods(
                resident.arch, resident.params, *zip(*pairs, strict=True), batch_size=2
            )
            chosen.append(int(np.argmax(sums / counts)))
            row = predictions(out, index, "sst2")[place]
            np.testing.assert_allclose(row["log_likelihoods"], sums, atol=1e-4)
            assert row["tokens"] == counts.tolist()
        right = [choice == example.answer for choice, example in zip(chosen, examples, strict=True)]
        found = record["results"][index]["sst2"]["accuracy"]
        assert found["value"] == 100 * np.mean(right)
        assert found["standard_error"] == pytest.approx(100 * np.std(right, ddof=1) / 2)
        assert found["rows"] == 4


def test_answers_are_those_of_direct_calls(evaluated):
    models, record, out = evaluated
    examples = make_examples(SQUAD, load_rows(SQUAD, DATA))
    resident = load_resident(models[1])
    written = generate(
        resident.arch,
        resident.params,
        [resident.tokenizer.encode(example.prompt, 10**6, True) for example in examples],
        max_new_tokens=6,
        eos_token_ids=resident.eos_token_ids,
        batch_size=4,
    )
    texts = [resident.tokenizer.decode(tokens).split("e")[0] for tokens in written]
    rows = predictions(out, 1, "squad_v2")
    assert [row["generated"] for row in rows] == texts
    assert [row["prediction"] for row in rows] == [text.strip() for text in texts]
    f1 = [squad_f1(t, e.references) for t, e in zip(texts, examples, strict=True)]
    assert [row["squad_f1"] for row in rows] == f1
    results = record["results"][1]["squad_v2"]
    assert results["squad_f1"]["value"] == pytest.approx(100 * np.mean(f1))
    assert results["no_answer_squad_f1"]["rows"] == 1


def test_the_folder_holds_record_page_and_answers(evaluated):
    _, record, out = evaluated
    assert json.loads((out / "evaluation.json").read_text())["results"] == record["results"]
    assert {path.name for path in out.iterdir()} == {"evaluation.json", "index.html", "predictions"}
    page = (out / "index.html").read_text()
    for text in ("2 models on 2 tasks", "squad_v2: F1", "has answer F1 (n = 2)", "Sentiment:", "±"):
        assert text in page
    assert len(predictions(out, 0, "sst2")) == 4


def test_an_evaluation_is_deterministic_whatever_the_batch(evaluated):
    models, record, _ = evaluated
    again = evaluate(
        models[:1], [find_task("sst2")], options=EvaluateOptions(data_root=DATA, batch_size=8)
    )
    assert again["results"][0]["sst2"] == record["results"][0]["sst2"]


def test_models_are_loaded_one_after_another(models, monkeypatch):
    events = []

    def load(model, checkpoint):
        events.append(("load", checkpoint.name))
        return with_weights(model, checkpoint)

    def answer(task, examples, model, **_):
        events.append(("score", task.task))
        return scoring.Scored({"accuracy": (50.0, None, 1)}, [])

    monkeypatch.setattr(evaluate_module, "with_weights", load)
    monkeypatch.setattr(evaluate_module, "score", answer)
    monkeypatch.setattr(evaluate_module, "_record", lambda *_: {})
    tasks = [find_task("sst2"), find_task("race")]
    evaluate(models, tasks, options=OPTIONS)
    asked = [("score", "sst2"), ("score", "race")]
    assert events == [("load", models[0]), *asked, ("load", models[1]), *asked]


def test_an_interrupted_evaluation_goes_on(evaluated, tmp_path, monkeypatch):
    models, record, finished = evaluated
    tasks, out, calls = [find_task("sst2"), SQUAD], tmp_path / "out", []

    def failing(task, examples, model, **settings):
        calls.append(task.task)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(task, examples, model, **settings)

    monkeypatch.setattr(evaluate_module, "score", failing)
    with pytest.raises(KeyboardInterrupt) as caught:
        evaluate(models, tasks, out, options=OPTIONS)
    assert "--resume" in caught.value.__notes__[0]
    journal = tmp_path / ".out.recall-work" / "journal.jsonl"
    whole = journal.read_text()
    other = EvaluateOptions(data_root=DATA, batch_size=3, resume=True)
    with pytest.raises(UnfinishedError, match="had other options"):
        evaluate(models, tasks, out, options=other)
    assert journal.read_text() == whole
    journal.write_text(whole + '{"model": 1, "task": "sst')
    lost = next((journal.parent / "out" / "predictions").glob("*/squad_v2.jsonl"))
    lost.write_bytes(lost.read_bytes()[:-9])  # as a lost disk may leave what was not yet on it
    evaluate(models, tasks, out, options=EvaluateOptions(data_root=DATA, batch_size=4, resume=True))
    assert calls == ["sst2", "squad_v2", "sst2", "squad_v2", "sst2", "squad_v2"]
    assert tree(out / "predictions") == tree(finished / "predictions")
    assert json.loads((out / "evaluation.json").read_text())["results"] == record["results"]
    assert not journal.parent.exists()


def test_a_journal_cut_anywhere_keeps_its_whole_lines(tmp_path):
    path, identity = tmp_path / "journal.jsonl", {"models": ["é"]}
    whole = EvaluationJournal(path, identity)
    for task in ("a", "b"):
        whole.record(0, task, {"accuracy": Estimate(50.0, None, 4)})
    content = path.read_bytes()
    ends = [end + 1 for end in range(len(content)) if content[end : end + 1] == b"\n"]
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        kept = sum(end <= size for end in ends)
        found = resume_evaluation_journal(path, identity)
        assert list(found.results.items()) == list(whole.results.items())[: max(kept - 1, 0)]
        found.record(1, "c", {})
        assert path.read_bytes().startswith(content[: ends[kept - 1] if kept else 0])
        assert len(resume_evaluation_journal(path, identity).results) == max(kept, 1)


def test_progress_counts_rows(models, monkeypatch):
    heard = []
    monkeypatch.setattr(scoring, "_BATCHES_AT_ONCE", 1)
    monkeypatch.setattr(
        scoring, "_choose", lambda _, examples, *__: [{"accuracy": 1.0}] * len(examples)
    )
    evaluate(
        models,
        [find_task("sst2")],
        options=EvaluateOptions(data_root=DATA, batch_size=3),
        progress=lambda *words: heard.append(words),
    )
    assert heard == [
        (f"sst2, {model}", done, 8)
        for model, start in (("qwen", 0), ("llama", 4))
        for done in (start, start + 3, start + 4)
    ]


def asked_of(monkeypatch, texts):
    """Let the model write these texts."""
    monkeypatch.setattr(scoring, "_generate", lambda *_: texts)


def test_multiple_choice_by_generation(monkeypatch, models):
    model = load_resident(models[1])
    task = changed("medmcqa", scoring={"by": "generation", "max_new_tokens": 4})
    choices = (" A", " B", " C", " D")
    texts = [" B", "(c) is right", "d.", "None", "", "Apple"]
    examples = [Example(i, "?", choices, min(i, 1) + (i > 0)) for i in range(len(texts))]
    asked_of(monkeypatch, texts)
    found = score(task, examples, model, batch_size=1)
    assert [row["prediction"] for row in found.predictions] == [1, 2, 3, None, None, None]
    assert [row["accuracy"] for row in found.predictions] == [0, 1, 0, 0, 0, 0]
    examples = [Example(0, "?", ("red", "Red deer"), 1)]
    asked_of(monkeypatch, ["red deer, of course"])
    assert score(task, examples, model, batch_size=1).metrics["accuracy"].value == 100


def test_no_answer_counts_as_an_empty_one(monkeypatch, models):
    texts = [" Unanswerable.", " The unanswerable one"]
    asked_of(monkeypatch, texts)
    task = changed("squad_v2")
    model = load_resident(models[1])
    found = score(task, [Example(0, "?"), Example(1, "?")], model, batch_size=1)
    assert [row["prediction"] for row in found.predictions] == ["", "The unanswerable one"]
    assert found.metrics["squad_exact_match"].value == 50


@pytest.mark.parametrize(("normalise", "chosen"), [("token", 0), ("byte", 1), ("none", 2)])
def test_likelihoods_are_divided_as_asked(normalise, chosen, monkeypatch, models):
    choices = (" éé", " bbbbbbbb", " c")
    sums, counts = np.asarray([-4.0, -7.0, -3.0]), np.asarray([4, 3, 1])
    monkeypatch.setattr(scoring, "log_likelihoods", lambda *_, **__: (sums, None, counts))
    task = changed("sst2", scoring={"by": "likelihood", "normalise": normalise})
    example = Example(0, "?", choices, 0)
    found = score(task, [example], load_resident(models[1]), batch_size=1)
    assert found.predictions[0]["prediction"] == chosen


def test_the_record_says_which_sacrebleu_it_was(models, monkeypatch):
    nothing = scoring.Scored({"bleu": Estimate(0.0, None, 3), "accuracy": Estimate(0, None, 3)}, [])
    monkeypatch.setattr(evaluate_module, "score", lambda *_, **__: nothing)
    for task, named in (("iwslt2017_en_fr", True), ("sst2", False)):
        record = evaluate(models[:1], [find_task(task)], options=OPTIONS)
        assert (record["versions"].get("sacrebleu") == sacrebleu.__version__) is named


def test_what_bleu_needs_is_asked_for_before_the_work(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setattr(evaluate_module, "with_weights", lambda *_: pytest.fail("loaded"))
    with pytest.raises(InputError, match="pip install sacrebleu"):
        evaluate(models, [find_task("iwslt2017_en_fr")], options=OPTIONS)


def test_a_model_without_numbers_is_named(models, monkeypatch):
    nothing = np.full(8, np.nan), None, np.ones(8)
    monkeypatch.setattr(scoring, "log_likelihoods", lambda *_, **__: nothing)
    with pytest.raises(InputError, match="qwen, sst2: the model gives NaN as a likelihood: try"):
        evaluate(models, [find_task("sst2")], options=OPTIONS)


@pytest.mark.parametrize(("task", "choices"), [("sst2", (" a", "")), ("squad_v2", ())])
def test_a_row_without_tokens_is_named(task, choices, models):
    examples = [Example(7, "" if not choices else "?", choices, 0, ("x",))]
    with pytest.raises(InputError, match=r"row 7 \(from 0\): its prompt .*has no tokens"):
        score(changed(task), examples, load_resident(models[1]), batch_size=1)


def test_spaces_before_a_choice_are_the_choice_s(models):
    tokenizer = load_resident(models[0]).tokenizer
    expected = [tokenizer.encode(text, 99, True) for text in ("Say:", "  yes")]
    assert list(split_tokens(tokenizer, "Say: ", " yes")) == expected
    assert list(split_tokens(tokenizer, "Say:", "  yes")) == expected


@pytest.mark.parametrize("special", ["B A", "A E", "B A E", "A"])
def test_a_prompt_is_not_ended_by_the_tokenizer(special, tmp_path):
    shutil.copytree(CHECKPOINTS / BASE, tmp_path / "model")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    token = ("<|endoftext|>", 256)
    template = special.replace("A", "$A").replace("B", token[0]).replace("E", token[0])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[token]
    )
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    found = load_resident(tmp_path / "model").tokenizer
    begin = [256] * special.startswith("B")
    assert found.encode("ab", 9, True) == [*begin, 64, 65, *[256] * special.endswith("E")]
    assert encode_prompt(found, "ab") == [*begin, 64, 65]
    assert encode_prompt(found, "") == begin
    assert list(split_tokens(found, "ab", "cd")) == [[*begin, 64, 65], [66, 67]]


def own_task(folder):
    (folder / "echo").mkdir(parents=True)
    rows = [{"question": f"q{index}", "answer": "x"} for index in range(9)]
    (folder / "echo" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "echo",
        "source": {"splits": {"test": [{"files": "rows.jsonl"}]}},
        "prompt": "{{ question }}",
        "references": "answer",
        "metrics": ["exact_match"],
        "scoring": {"by": "generation", "max_new_tokens": 2},
    }
    path = folder / "echo.yml"
    path.write_text(yaml.safe_dump(task))
    return path


def test_the_command(recall, models, tmp_path):
    shutil.copytree(DATA / "sst2", tmp_path / "data" / "sst2")
    own = own_task(tmp_path / "data")
    words = ["evaluate", models[0], models[0], "--tasks", f"sst2, {own}", "--limit", "3"]
    words += ["--data-root", tmp_path / "data", "--out", tmp_path / "out", "--seed", "5"]
    done = recall(*words)
    assert (done.status, done.err) == (0, "")
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [task["rows"] for task in record["tasks"]] == [3, 3]
    assert [task["rows_in_all"] for task in record["tasks"]] == [4, 9]
    assert "sst2: accuracy" in done.out
    assert "echo: exact match" in done.out
    value = record["results"][1]["sst2"]["accuracy"]
    assert f"{value['value']:.1f} ± {value['standard_error']:.1f}" in done.out
    kept = [row["row"] for row in predictions(tmp_path / "out", 0, "echo")]
    expected = np.random.default_rng(5).choice(9, 3, replace=False)
    assert kept == sorted(expected.tolist())
    refused = recall(*words)
    assert refused.status == 2
    assert "out exists: choose another folder or pass --force" in refused.err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_a_narrow_encoding_fails_no_table(encoding, recall, evaluated, monkeypatch):
    models, record, _ = evaluated
    monkeypatch.setattr(evaluate_module, "evaluate", lambda *_, **options: record)
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    with pytest.raises(SystemExit) as end:
        main(["evaluate", *models, "--tasks", "sst2", "--data-root", str(DATA)])
    out, err = ((stream.flush(), stream.buffer.getvalue())[1] for stream in streams)
    assert (end.value.code, err) == (0, b"")
    value = record["results"][0]["sst2"]["accuracy"]
    sign = {"ascii": rb"\xb1", "latin-1": b"\xb1", "cp437": b"\xf1", "utf-8": b"\xc2\xb1"}[encoding]
    wanted = b"%.1f %s %.1f" % (value["value"], sign, value["standard_error"])
    assert wanted in out


def test_the_command_lists_and_shows_tasks(recall):
    assert "race: Reading comprehension" in recall("evaluate", "--list").out
    shown = recall("evaluate", "--show", "race").out
    assert Task.model_validate(yaml.safe_load(shown)) == find_task("race")


MISTAKES = {
    "no model": (["--tasks", "sst2"], "name at least one model"),
    "no task": (["MODEL"], "name at least one task: "),
    "unknown task": (["MODEL", "--tasks", "sst"], "no task 'sst': choose from"),
    "no rows": (["MODEL", "--tasks", "sst2", "--data-root", "DIR"], "has no rows of sst2: put"),
    "no folder": (["DIR", "--tasks", "sst2", "--data-root", "DATA"], "config.json"),
    "resume": (["MODEL", "--tasks", "sst2", "--resume"], "--resume continues an output"),
    "show": (["--show", "sst"], "no task 'sst': choose from"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case, recall, models, tmp_path):
    words, message = MISTAKES[case]
    names = {"MODEL": models[0], "DIR": tmp_path, "DATA": DATA}
    done = recall("evaluate", *(names.get(word, word) for word in words))
    assert done.status == 2
    assert message in done.err
    assert done.err.count("\n") == 1


def test_prompts_too_long_for_a_model_are_counted(models, monkeypatch, tmp_path):
    encode = load_resident(models[0]).tokenizer.encode
    examples = make_examples(SQUAD, load_rows(SQUAD, DATA))
    lengths = [len(encode(example.prompt, 10**6, True)) for example in examples]
    fits = max(lengths) + SHORT["max_new_tokens"] - 1  # the last token is not fed
    monkeypatch.setattr(evaluate_module, "score", lambda *_, **__: NOTHING)
    said = {}
    for limit in (fits, fits - 1):
        model = copy_model(models[0], tmp_path / str(limit), max_position_embeddings=limit)
        out = tmp_path / f"{limit}-out"
        record = evaluate([str(model)], [SQUAD], out, options=OPTIONS)
        said[limit] = record["warnings"]
        assert ("1 warning" in (out / "index.html").read_text()) == bool(said[limit])
    assert said == {
        fits: [],
        fits - 1: [
            f"squad_v2: {lengths.count(max(lengths))} of 3 rows can take more, with their answers, "
            f"than the {fits - 1} tokens that {fits - 1} was made for; nothing is truncated"
        ],
    }


NOTHING = scoring.Scored(dict.fromkeys(SQUAD.metrics, Estimate(0.0, None, 3)), [])


@pytest.mark.parametrize("task", ["sst2", "race"])
def test_the_longest_choice_counts(task, models):
    examples = make_examples(find_task(task), load_rows(find_task(task), DATA))
    model = load_resident(models[0])
    encode = model.tokenizer.encode
    texts = [example.prompt + choice for example in examples for choice in example.choices]
    longest = max(len(encode(text, 10**6, True)) for text in texts)
    for limit, count in ((longest - 1, 0), (longest - 2, 1), (0, len(examples))):
        assert count_too_long(find_task(task), examples, replace(model, max_length=limit)) == count


def test_prompts_that_memory_would_not_hold_are_refused(models, monkeypatch):
    task = find_task("sst2")
    model = load_resident(models[0])
    first, second, *_ = make_examples(task, load_rows(task, DATA))
    long = replace(second, prompt="abc " * 5000)
    check_memory(task, [first, long], model, 8)
    monkeypatch.setattr(lengths, "memory_budget", lambda asked: 20 << 20)
    with pytest.raises(InputError, match=rf"sst2, row {second.row} .*takes 15,0.* of 8 such rows"):
        check_memory(task, [first, long], model, 8)
    endless = replace(second, prompt="abc " * 10**6)
    for asked in (task, changed("sst2", scoring={"by": "generation", "max_new_tokens": 3})):
        with pytest.raises(InputError, match=r"4,000,0\d\d characters is too long for the memory"):
            scoring.score(asked, [first, endless], model, batch_size=8)


def test_numbers_out_of_range_are_refused(models):
    with pytest.raises(InputError, match="limit must be at least 1, not 0"):
        EvaluateOptions(limit=0)
    with pytest.raises(InputError, match="batch_size must be at least 1, not 0"):
        EvaluateOptions(batch_size=0)
    for nothing in (([], [SQUAD]), (models, [])):
        with pytest.raises(InputError, match="name at least one model and one task"):
            evaluate(*nothing, options=OPTIONS)


def test_a_model_without_a_tokenizer_is_found_before_any_is_asked(models, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate_module, "with_weights", lambda *_: pytest.fail("loaded"))
    bare = copy_model(models[1], tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match="bare has no tokenizer"):
        evaluate([models[0], str(bare)], [find_task("sst2")], options=OPTIONS)


def test_a_model_that_is_wrong_is_found_before_any_is_asked(models, toys, monkeypatch):
    monkeypatch.setattr(evaluate_module, "with_weights", lambda *_: pytest.fail("loaded"))
    with pytest.raises(InputError, match="eos_token_id"):
        evaluate([models[0], toys.qwen2[0]], [find_task("sst2")], options=OPTIONS)
