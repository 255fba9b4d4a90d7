"""Tasks: their files, the layouts their rows come in, the prompts they make, and wrong ones."""

import datetime
import json
import sys
import types

import pytest
import yaml
from published import DATA, PARQUET, ROWS, data_root, write_parquet

from recall_jax.errors import InputError
from recall_jax.evaluation import rows as rows_module
from recall_jax.evaluation.examples import make_examples
from recall_jax.evaluation.rows import load_rows
from recall_jax.evaluation.task import Task, find_task, find_tasks, task_names, task_text

__all__ = ["data_root"]

OWN = {
    "task": "own",
    "source": {"splits": {"test": [{"files": "*.jsonl"}]}},
    "prompt": "{{ question }}\n",
    "references": "answer",
    "metrics": ["exact_match"],
    "scoring": {"by": "generation", "max_new_tokens": 4},
}


def own(tmp_path, text=None, **changes):
    path = tmp_path / "own.yml"
    kept = {key: value for key, value in (OWN | changes).items() if value is not None}
    path.write_text(text or yaml.safe_dump(kept))
    return str(path)


def test_the_five_tasks_are_there():
    assert set(task_names()) >= set(ROWS)
    assert [find_task(name).task for name in task_names()] == task_names()


def normal(rows):
    """Rows without what some layouts lack, and numbers that GLUE's tsv has as text."""
    return [
        {**{k: v for k, v in row.items() if k != "idx"}, "label": int(row["label"])}
        if "label" in row
        else row
        for row in rows
    ]


@pytest.mark.parametrize("task", ROWS)
def test_original_files_give_the_hub_s_rows(task):
    assert normal(load_rows(find_task(task), DATA).rows) == normal(ROWS[task])


@pytest.mark.parametrize(
    ("task", "path"), [(task, path) for task, paths in PARQUET.items() for path in paths]
)
def test_parquet_files_of_the_hub_are_read(task, path, tmp_path):
    write_parquet(tmp_path / task / path, task)
    found = load_rows(find_task(task), tmp_path)
    assert list(found.rows) == ROWS[task]
    assert found.files == (tmp_path / task / path,)


def test_shards_are_read_in_order(tmp_path):
    for index, row in enumerate(ROWS["sst2"]):
        name = f"validation-{index:05}-of-00004.parquet"
        write_parquet(tmp_path / "sst2" / name, "sst2", [row])
    assert list(load_rows(find_task("sst2"), tmp_path).rows) == ROWS["sst2"]


def test_training_files_of_iwslt_have_lines_about_the_talk():
    task = find_task("iwslt2017_en_fr").model_copy(update={"split": "train"})
    assert [row["translation"] for row in load_rows(task, DATA).rows] == [
        {"en": "A river is never the same.", "fr": "Une rivière n'est jamais la même."},
        {"en": "Neither are we.", "fr": "Nous non plus."},
        {"en": "Thank you.", "fr": "Merci."},
    ]


GOLDEN = {
    "sst2": (0, 'Review: a warm , funny film that earns its "happy ending\nSentiment:'),
    "squad_v2": (
        1,
        "Arnholm's lighthouse was finished in 1871. Its lamp burnt oil.\n\n"
        'Answer in words of the text, or with "unanswerable" if it does not say.\n'
        "Question: When was the lighthouse of Arnholm pulled down?\nAnswer:",
    ),
    "iwslt2017_en_fr": (
        1,
        "Translate from English to French.\nEnglish: My brother & I built a boat.\nFrench:",
    ),
    "race": (
        2,
        "Tom has a red kite.\n\nQuestion: Tom's kite is   _  .\nAnswer:",
    ),
    "medmcqa": (
        0,
        "Question: Which vitamin is lacking in scurvy?\nA. Vitamin A\nB. Vitamin B1\n"
        "C. Vitamin C\nD. Vitamin D\nAnswer:",
    ),
}
ANSWERS = {
    "sst2": [(" negative", " positive"), [1, 0, 1, 0]],
    "race": [(" red", " blue", " green", " white"), [1, 3, 0]],
    "medmcqa": [(" A", " B", " C", " D"), [2, 0]],
    "squad_v2": [("1871", "in 1871"), (), ("the ships",)],
    "iwslt2017_en_fr": [
        ("Bonjour.",),
        ("Mon frère & moi avons construit un bateau.",),
        ("Il flotte.",),
    ],
}


@pytest.mark.parametrize("task", GOLDEN)
def test_prompts_and_answers(task):
    examples = make_examples(find_task(task), load_rows(find_task(task), DATA))
    index, prompt = GOLDEN[task]
    assert examples[index].prompt == prompt
    if examples[0].choices:
        assert [examples[-1].choices, [example.answer for example in examples]] == ANSWERS[task]
    else:
        assert [example.references for example in examples] == ANSWERS[task]


def test_a_draw_is_by_seed_and_keeps_the_order():
    rows = load_rows(find_task("sst2"), DATA)
    drawn = rows.draw(2, seed=3)
    assert drawn == rows.draw(2, seed=3)
    assert [rows.rows[number] for number in drawn.numbers] == list(drawn.rows)
    assert list(drawn.numbers) == sorted(drawn.numbers)
    assert len({rows.draw(2, seed).numbers for seed in range(10)}) > 1
    assert rows.draw(4, 0) is rows.draw(None, 0) is rows
    assert drawn.places[0].endswith(f"row {drawn.numbers[0]} (from 0)")


def test_rows_of_a_task_of_one_s_own(tmp_path):
    task = find_task(own(tmp_path))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "rows.jsonl").write_text(
        json.dumps({"question": "2+2?", "answer": ["4", "four"]}) + "\n"
    )
    examples = make_examples(task, load_rows(task, tmp_path))
    assert examples[0].prompt == "2+2?\n"
    assert examples[0].references == ("4", "four")


def test_rows_of_a_generator(tmp_path, monkeypatch):
    def digits(task, count, seed):
        return [{"question": task, "answer": str(seed + index)} for index in range(count)]

    monkeypatch.setitem(rows_module.GENERATORS, "digits", digits)
    source = {"generator": "digits", "task": "count", "count": 3, "seed": 4}
    task = find_task(own(tmp_path, source=source))
    assert [e.references for e in make_examples(task, load_rows(task, None))] == [
        ("4",),
        ("5",),
        ("6",),
    ]
    with pytest.raises(InputError, match=r"no generator 'os' of rows: known are .*digits"):
        load_rows(find_task(own(tmp_path, source=source | {"generator": "os"})), None)


WRONG = {
    "not YAML": ({"text": "task: [\n"}, "own.yml is not YAML: .*line 2"),
    "not a mapping": ({"text": "- task"}, "own.yml must hold one mapping with task and source"),
    "a key twice": ({"text": "task: a\ntask: b"}, "key 'task' is given twice"),
    "unknown key": ({"promt": "x"}, "own.yml: unknown key promt; did you mean prompt?"),
    "nothing alike": ({"zzzz": 1}, "unknown key zzzz; known are task, about"),
    "missing": ({"prompt": None}, "own.yml: prompt is missing"),
    "no template": ({"prompt": "{{ a"}, "prompt: is no Jinja template: .*line 1"),
    "no expression": ({"references": "a b"}, "references: is no Jinja expression"),
    "unknown metric": ({"metrics": ["acc"]}, r"metrics\.0 should be 'exact_match', .*not 'acc'"),
    "no metric": ({"metrics": []}, "metrics should be a list with entries"),
    "unknown scoring": ({"scoring": {"by": "vote"}}, "scoring should be .*'likelihood'"),
    "above the folder": (
        {"source": {"splits": {"test": [{"files": "../other/*.jsonl"}]}}},
        r"source\.splits\.test\.0\.files: '../other/\*.jsonl' leads out of the task's folder",
    ),
    "anywhere": (
        {"source": {"splits": {"test": [{"files": "/etc/passwd"}]}}},
        "'/etc/passwd' leads out of the task's folder",
    ),
    **{
        f"glob {pattern}": (
            {"source": {"splits": {"test": [{"files": pattern}]}}},
            r"source\.splits\.test\.0\.files: .* is no pattern of files: use \*\* once",
        )
        for pattern in ("**x", "a/x**", "**/**/*.jsonl", "a/**/b/**", ".", "a\0b", "***")
    },
    "wrong number": (
        {"scoring": {"by": "generation", "max_new_tokens": "4"}},
        r"scoring\.max_new_tokens should be a valid integer, not '4'",
    ),
    "inner key": (
        {"scoring": {"by": "generation", "max_new_tokens": 4, "stops": ["x"]}},
        r"unknown key scoring\.stops; did you mean stop?",
    ),
    "layout": (
        {"source": {"splits": {"test": [{"files": "x", "layout": "xlsx"}]}}},
        r"source\.splits\.test\.0\.layout should be 'rows', ",
    ),
    "no such split": ({"split": "dev"}, "split 'dev' is not in source.splits, which has test"),
    "neither kind": ({"references": None}, "give either choices .* or references"),
    "likelihood of text": ({"scoring": {"by": "likelihood"}}, "by likelihood needs choices"),
    "choices alone": (
        {"choices": ["a", "b"], "references": None, "metrics": None},
        "choices and answer belong together",
    ),
    "name": ({"task": "../x"}, "task should "),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_task_is_one_line(case, tmp_path):
    changes, message = WRONG[case]
    with pytest.raises(InputError, match=message) as caught:
        find_task(own(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_tasks_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"no task 'sst': choose from .*sst2.* or give a file"):
        find_task("sst")
    with pytest.raises(InputError, match=r"cannot read .*gone.yml: No such file"):
        find_task(str(tmp_path / "gone.yml"))
    with pytest.raises(InputError, match="two tasks are called own"):
        find_tasks([own(tmp_path), own(tmp_path)])


def test_missing_files_say_what_to_put_where(tmp_path):
    with pytest.raises(
        InputError,
        match=r"/squad_v2 has no rows of squad_v2: put validation-\*\.parquet or .* or "
        r"dev-v2\.0\.json there",
    ):
        load_rows(find_task("squad_v2"), tmp_path)
    with pytest.raises(
        InputError, match=r"put \*\.jsonl into DIR/own and name DIR as evaluate.data_root"
    ):
        load_rows(find_task(own(tmp_path)), None)


def test_what_looks_like_the_end_of_a_line_stays_in_its_sentence(data_root):
    odd = "one\u2028two\x85three"
    exam = json.dumps({"question": odd, "cop": 1}, ensure_ascii=False)
    (data_root / "medmcqa" / "dev.json").write_text(exam + "\r\n\n", encoding="utf-8")
    (data_root / "sst2" / "dev.tsv").write_text(
        f"sentence\tlabel\n{odd}\t1\n{'x' * 200_000}\t0\n\n", encoding="utf-8"
    )
    talks = data_root / "iwslt2017_en_fr"
    (talks / "train.tags.en-fr.en").write_text(f"{odd}\ntwo\n", encoding="utf-8")
    (talks / "train.tags.en-fr.fr").write_text("un\ndeux\n", encoding="utf-8")
    train = find_task("iwslt2017_en_fr").model_copy(update={"split": "train"})
    assert load_rows(find_task("medmcqa"), data_root).rows == ({"question": odd, "cop": 0},)
    assert [row["label"] for row in load_rows(find_task("sst2"), data_root).rows] == ["1", "0"]
    assert load_rows(train, data_root).rows[0] == {"translation": {"en": odd, "fr": "un"}}


BROKEN = {
    "sst2/dev.tsv": ("sentence\tlabel\nno label\n", "dev.tsv, line 2 has 1 fields, the header has"),
    "squad_v2/dev-v2.0.json": ("[]", "not laid out as squad files are: "),
    "medmcqa/dev.json": ('{"question": "x"}\n', "laid out as medmcqa files are: key 'cop' is"),
    "race/test/high/7.txt": ("Ann built a boat.", "7.txt is not JSON"),
    "race/test/middle/12.txt": (
        '{"article": "", "questions": ["?"], "options": [], "answers": ["A"], "id": ""}',
        "12.txt is not laid out as race files are: zip",
    ),
    "iwslt2017_en_fr/IWSLT17.TED.tst2010.en-fr.fr.xml": (
        '<seg id="1">Bonjour.</seg>',
        "en.xml has 2 sentences, but .*fr.xml has 1",
    ),
}


@pytest.mark.parametrize("path", BROKEN)
def test_a_broken_file_is_one_line(path, data_root):
    content, message = BROKEN[path]
    (data_root / path).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_rows(find_task(path.split("/")[0]), data_root)
    assert "\n" not in str(caught.value)


def test_a_missing_half_of_a_translation_is_named(data_root):
    (data_root / "iwslt2017_en_fr" / "IWSLT17.TED.tst2011.en-fr.fr.xml").unlink()
    with pytest.raises(InputError, match=r"tst2011\.en-fr\.fr\.xml: No such file"):
        load_rows(find_task("iwslt2017_en_fr"), data_root)


ROW_FAULTS = {
    "no field": ({"answer": "x"}, r"row 1 \(from 0\): prompt: 'question' is undefined \(the row"),
    "no reference": ({"question": "x"}, "references: 'answer' is undefined"),
    "half a character": ({"question": "\ud83d", "answer": "x"}, "prompt: .*surrogates not allowed"),
    "none": ({"question": "x", "answer": []}, "there is none, but exact_match needs one"),
    "no text": ({"question": "x", "answer": 4}, "references: 4 is no text and no list of texts"),
}


@pytest.mark.parametrize("case", ROW_FAULTS)
def test_a_row_that_does_not_fit_is_named(case, tmp_path):
    row, message = ROW_FAULTS[case]
    (tmp_path / "own").mkdir()
    lines = [json.dumps({"question": "x", "answer": "y"}), json.dumps(row)]
    (tmp_path / "own" / "rows.jsonl").write_text("\n".join(lines))
    task = find_task(own(tmp_path))
    with pytest.raises(InputError, match=message):
        make_examples(task, load_rows(task, tmp_path))


@pytest.mark.parametrize("label", [-1, None])
def test_a_row_without_a_label_is_named(label, tmp_path):
    unlabelled = [{**ROWS["sst2"][0], "label": label}]
    write_parquet(tmp_path / "sst2" / PARQUET["sst2"][0], "sst2", unlabelled)
    task = find_task("sst2")
    with pytest.raises(InputError, match=r"answer: -1 is no index from 0 to 1: take a split with"):
        make_examples(task, load_rows(task, tmp_path))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ question.append('x') }}",
        "{% include '/etc/passwd' %}",
        "{{ self.__init__.__globals__ }}",
        "{{ lipsum() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "r.jsonl").write_text('{"question": ["x"], "answer": "y"}\n')
    task = find_task(own(tmp_path, prompt=template))
    with pytest.raises(InputError, match="prompt: "):
        make_examples(task, load_rows(task, tmp_path))


def test_yaml_makes_no_objects(tmp_path):
    text = task_text("sst2").replace("sst2", "!!python/object/apply:os.getcwd []", 1)
    with pytest.raises(InputError, match="is not YAML: could not determine a constructor"):
        find_task(own(tmp_path, text=text))


def test_without_a_data_root_rows_come_from_the_hub(monkeypatch):
    asked = []

    def load_dataset(path, name=None, data_dir=None, *, split, revision=None):
        asked.append((path, name, data_dir, split, revision))
        return iter(ROWS["iwslt2017_en_fr"])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = load_rows(find_task("iwslt2017_en_fr"), None)
    assert list(found.rows) == ROWS["iwslt2017_en_fr"]
    assert asked == [("IWSLT/iwslt2017", None, "iwslt2017-en-fr", "test", "refs/convert/parquet")]


def test_a_hub_that_cannot_be_had_says_what_to_put_where(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\n(offline)")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        InputError,
        match=r"no rows of sst2, stanfordnlp/sst2 of the hub: datasets cannot load it \(Couldn't "
        r"reach the Hub \(offline\)\); put validation-.* into DIR/sst2 and name DIR as "
        "evaluate.data_root",
    ):
        load_rows(find_task("sst2"), None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"datasets, .*, is not installed \(pip install .*\); put"):
        load_rows(find_task("sst2"), None)


def test_choices_that_no_answer_can_name_are_refused():
    changes = {"choices": ["+", "-"], "answer": "0", "references": None, "metrics": None}
    task = Task.model_validate(OWN | changes)
    rows = rows_module.TaskRows(({"question": "1 ? 1"},), (0,), ("row 0",), "here")
    with pytest.raises(InputError, match=r"row 0: choices: one of '\+', '-' has no word"):
        make_examples(task, rows)


def test_a_field_may_have_any_name():
    task = Task.model_validate(OWN | {"prompt": "{{ self }}?"})
    rows = rows_module.TaskRows(({"self": "x", "answer": "y"},), (0,), ("row 0",), "here")
    assert make_examples(task, rows)[0].references == ("y",)


def test_rows_that_json_lacks_words_for_make_prompts(tmp_path):
    task = Task.model_validate(OWN | {"prompt": "{{ day }}", "references": "answer"})
    rows = rows_module.TaskRows(
        ({"day": datetime.date(2024, 2, 29), "answer": "x"},), (0,), ("row 0",), "here"
    )
    assert make_examples(task, rows)[0].prompt == "2024-02-29"
