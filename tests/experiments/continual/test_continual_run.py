"""Whole runs: what they leave, what they make once, and that a stopped one goes on to the same."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml

from recall_jax.errors import InputError, UnfinishedError
from recall_jax.experiments.continual import workshop
from recall_jax.experiments.continual.recipe import Protocol
from recall_jax.experiments.continual.run import ContinualOptions, continual
from recall_jax.files.schema import validate


class Stopped(BaseException):
    """As a signal does, or a kill: nobody catches it."""


def digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Stand:
    """In place of training, merging and asking: folders of a line that depends on all inputs."""

    def __init__(self, monkeypatch):
        self.made: list[str] = []
        self.asked = 0
        self.taken_up: list[str] = []
        self.most = 0
        self.stop_after = -1
        monkeypatch.setattr(workshop.tuning, "finetune", self.finetune)
        monkeypatch.setattr(workshop.job, "merge", self.merge)

    def step(self):
        if self.stop_after == 0:
            raise Stopped
        self.stop_after -= 1

    def read(self, spec):
        if not Path(spec).is_relative_to(Path(self.home)):
            return spec
        return Path(spec, "line").read_text()

    def write(self, out, *parts):
        unfinished = out.with_name(f".{out.name}.recall-work")
        if unfinished.exists():
            self.taken_up.append(out.name)
        unfinished.mkdir(exist_ok=True)
        self.step()
        unfinished.rmdir()
        self.made.append(out.name)
        out.mkdir()
        (out / "line").write_text(digest(*parts))
        self.most = max(self.most, len(list(out.parent.iterdir())))

    def finetune(self, model, out, settings, *, options, progress):
        self.home = out.parent
        rows = Path(settings.data).read_text()
        self.write(out, self.read(model), rows, settings.seed, settings.learning_rate)
        return {"warnings": ["hot"]}

    def merge(self, recipe, out, *, options, progress):
        models = [self.read(entry.model) for entry in recipe.models]
        self.write(out, models, recipe.merge_method)
        return {"warnings": []}


@pytest.fixture
def stand(monkeypatch):
    stand = Stand(monkeypatch)

    def ask(shop, model):
        stand.home = shop.folder
        stand.step()
        stand.asked += 1
        seen = digest(stand.read(shop.spec(model)))
        return {
            each.task.task: {"exact_match": {"value": int(seen[at : at + 4], 16) / 655.36}}
            for at, each in enumerate(shop.tasks)
        }

    monkeypatch.setattr(workshop.Workshop, "_evaluate", ask)
    return stand


def asked(protocol, **changes):
    return validate(Protocol, protocol | changes, "recipe")


def untimed(folder):
    files = {p.relative_to(folder): p.read_text() for p in folder.rglob("*") if p.is_file()}
    record = json.loads(files.pop(Path("continual.json")))
    del files[Path("index.html")], record["timing_s"]
    return files, record


def test_every_model_is_made_once_and_cleared_when_done_with(protocol, stand, tmp_path):
    lines = []
    record = continual(asked(protocol, seeds=[0, 1]), tmp_path / "out", announce=lines.append)
    assert len(stand.made) == len(set(stand.made)) == 2 * (6 + 3 + 3 + 3)
    assert lines[0] == "5 strategies, 1 order, 2 seeds, 12 fine-tunings, 18 merges"
    assert [line.split("-")[0] for line in record["warnings"]] == ["reverse"]
    assert record["warnings"][0].endswith(" and 11 more: hot")
    kept = {path.name for path in (tmp_path / "out" / "models").iterdir()}
    assert kept == {run["models"][-1] for run in record["runs"]}
    assert all((tmp_path / "out" / run["kept"]).is_dir() for run in record["runs"])
    # three experts, three of the sequence and what is kept or just made, not all 30
    assert stand.most <= 5 + 5 + 6
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert table[0].startswith("| strategy | final average | unseen average |")
    assert [line.split(" | ")[0] for line in table[2:]] == [
        f"| {name}" for name in ("base", *record["strategies"])
    ]
    matrix = json.loads((tmp_path / "out" / "matrices" / "average-0-1.json").read_text())
    assert (matrix["stages"], len(matrix["R"])) == (["base", "reverse", "sort", "shift"], 4)
    assert matrix["columns"] == ["reverse", "sort", "shift", "strings_swap"]
    assert matrix["R"][-1] == [
        record["models"][matrix["models"][-1]]["results"][f"strings_{name}"]["exact_match"]["value"]
        for name in ("reverse", "sort", "shift", "swap")
    ]


def test_wherever_a_run_is_stopped_it_goes_on_to_the_same(protocol, stand, tmp_path):
    recipe = asked(protocol, strategies=["sequential", "average", "recall_sequential", "joint"])
    whole = tmp_path / "whole"
    continual(recipe, whole)
    steps, made = len(stand.made) + stand.asked, list(stand.made)
    for after in range(0, steps, 4):
        stand.made.clear()
        stand.stop_after = after
        with pytest.raises(Stopped):
            continual(recipe, tmp_path / "out")
        stand.stop_after = -1
        assert not (tmp_path / "out").exists()
        continual(recipe, tmp_path / "out", options=ContinualOptions(resume=True))
        assert stand.made == made
        assert untimed(tmp_path / "out") == untimed(whole)
        shutil.rmtree(tmp_path / "out")


def test_what_was_being_made_is_gone_on_with(protocol, stand, tmp_path):
    stand.stop_after = 5  # two tasks are learnt and asked after the base, and a third begun
    with pytest.raises(Stopped):
        continual(asked(protocol), tmp_path / "out")
    stand.stop_after = -1
    continual(asked(protocol), tmp_path / "out", options=ContinualOptions(resume=True))
    assert stand.taken_up == stand.made[2:3]


def test_strategies_can_be_added_to_a_stopped_run(protocol, stand, tmp_path):
    stand.stop_after = 12
    with pytest.raises(Stopped):
        continual(asked(protocol, strategies=["sequential", "average"]), tmp_path / "out")
    stand.stop_after = -1
    more = asked(protocol, strategies=["sequential", "average", "recall"])
    continual(more, tmp_path / "out", options=ContinualOptions(resume=True))
    assert len(stand.made) == len(set(stand.made))
    continual(more, tmp_path / "whole")
    assert untimed(tmp_path / "out") == untimed(tmp_path / "whole")


def test_other_rows_or_questions_are_another_run(protocol, stand, tmp_path):
    rows = tmp_path / "rows.jsonl"
    shutil.copy(protocol["tasks"][0]["data"], rows)
    tasks = [protocol["tasks"][0] | {"data": str(rows)}, *protocol["tasks"][1:]]
    mine = asked(protocol, tasks=tasks)
    stand.stop_after = 4
    with pytest.raises(Stopped):
        continual(mine, tmp_path / "out")
    stand.stop_after = -1
    other = asked(protocol, tasks=tasks, evaluate={"limit": 3})
    with pytest.raises(UnfinishedError, match="had another evaluated: go back to it"):
        continual(other, tmp_path / "out", options=ContinualOptions(resume=True))
    rows.write_text(rows.read_text() + rows.read_text())
    with pytest.raises(UnfinishedError, match=r"rows\.jsonl is not what it was when the run was"):
        continual(mine, tmp_path / "out", options=ContinualOptions(resume=True))
    for holding in (tmp_path, Path(protocol["base_model"])):
        with pytest.raises(InputError, match="holds the input"):
            continual(mine, holding, options=ContinualOptions(force=True))


def test_a_fault_on_the_way_keeps_what_was_made(protocol, stand, tmp_path, monkeypatch):
    def faulty(recipe, out, **rest):
        raise InputError("the disk of this model is gone")

    with monkeypatch.context() as patch:
        patch.setattr(workshop.job, "merge", faulty)
        with pytest.raises(
            UnfinishedError, match="seed 0, order 0, average, reverse: the disk of this model"
        ):
            continual(asked(protocol), tmp_path / "out")
    before = list(stand.made)
    continual(asked(protocol), tmp_path / "out", options=ContinualOptions(resume=True))
    assert len(before) == 3 and stand.made[:3] == before
    assert len(stand.made) == len(set(stand.made))


ROWS = {
    "a row without text": ({"words": "ab"}, {}, "row 24 .from 0. has neither text, nor prompt"),
    "a row that is no text": ({"prompt": 1, "completion": "ab"}, {}, "row 24 .from 0.: field"),
    "a row of nothing": ({"text": ""}, {}, "row 24 .from 0. tokenises to nothing"),
    "rows that are too long": (None, {"max_tokens": 2}, "no row has a token to learn"),
    "a share that takes all": (None, {"validation_share": 0.99}, "leaves none to train on"),
    "a step that learns nothing": (None, {"steps": 1, "warmup": 0.5}, "nothing would be learnt"),
}


@pytest.mark.parametrize("case", ROWS)
def test_every_row_is_read_before_anything_is_trained(case, protocol, stand, tmp_path):
    row, settings, match = ROWS[case]
    last = tmp_path / "last.jsonl"
    shutil.copy(protocol["tasks"][-1]["data"], last)
    if row is not None:
        last.write_text(last.read_text() + json.dumps(row) + "\n")
    tasks = [*protocol["tasks"][:-1], protocol["tasks"][-1] | {"data": str(last)}]
    changes = {"tasks": tasks, "finetune": protocol["finetune"] | settings}
    with pytest.raises(InputError, match=match) as caught:
        continual(asked(protocol, **changes), tmp_path / "out")
    assert not isinstance(caught.value, UnfinishedError)
    assert (stand.made, stand.asked) == ([], 0)
    assert [path.name for path in tmp_path.iterdir()] == ["last.jsonl"]


def test_rows_to_merge_by_are_read_before_as_well(protocol, stand, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "ab"}\n{"text": ""}\n')
    samples = {"data": str(rows), "max_tokens": 32}
    with pytest.raises(InputError, match=r"strategy of recall: .*row 1 .from 0. tokenises to"):
        continual(asked(protocol, samples=samples, strategies=["recall"]), tmp_path / "out")
    assert (stand.made, stand.asked) == ([], 0)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_run_that_measured_nothing_is_not_kept(protocol, stand, tmp_path, monkeypatch):
    def faulty(shop, model):
        raise InputError("the likelihood is NaN")

    monkeypatch.setattr(workshop.Workshop, "_evaluate", faulty)
    with pytest.raises(UnfinishedError, match="the likelihood is NaN") as caught:
        continual(asked(protocol), tmp_path / "out")
    assert not hasattr(caught.value, "__notes__")
    assert list(tmp_path.iterdir()) == []


def test_the_command_trains_merges_and_tells(protocol, recall, tmp_path):
    strategies = ["recall", "lora"]
    order = {"orders": [["reverse", "sort"]], "strategies": strategies}
    text = yaml.safe_dump(protocol | order | {"finetune": protocol["finetune"] | {"steps": 1}})
    (tmp_path / "two.yml").write_text(text)
    out = tmp_path / "two"
    done = recall("continual", tmp_path / "two.yml", "--out", out)
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == "2 strategies, 1 order, 1 seed, 4 fine-tunings, 2 merges"
    assert lines[-1] == f"every matrix, and how each task fares: {out / 'index.html'}"
    record = json.loads((out / "continual.json").read_text())
    for run in record["runs"]:  # the adapters of lora are folded in
        assert (out / run["kept"] / "model.safetensors").is_file()
    page = (out / "index.html").read_text()
    assert "<svg" in page and 'class="heat"' in page
    assert not {"http:", "https:"} & {part.split("//")[0][-6:] for part in page.split('src="')[1:]}
    again = recall("continual", tmp_path / "two.yml", "--out", out)
    assert (again.status, again.err.count("\n")) == (2, 1)
    assert "exists: choose another folder or pass --force" in again.err
