"""`recall finetune` as a user runs it: what it writes, how it goes on, and what it refuses."""

import gzip
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from toys import copy_model
from transformers import AutoModelForCausalLM

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.cli import console
from recall_jax.files.journal_lines import journal_line
from recall_jax.jobs import finetune as job
from recall_jax.training.checkpoints import History, TrainingCheckpoints
from recall_jax.training.step import TrainState

ROWS = [{"prompt": f"{a}{b}=", "completion": f"{b}{a}"} for a in "abcde" for b in "vwxyz"]
QUICK = ["--batch-size", 5, "--learning-rate", 0.02, "--steps", 10]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "swap.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def finetune(recall, toys, data, tmp_path):
    """`recall finetune` on a toy, ten quick steps, into tmp_path/out unless told otherwise."""

    def run(*options, model=toys.llama[0], rows=data, out="out", quick=QUICK):
        return recall("finetune", model, "--data", rows, "--out", tmp_path / out, *quick, *options)

    return run


@pytest.fixture
def killed_at(finetune, monkeypatch):
    """The same, killed when a step has been heard of."""

    def run(step, *options, **places):
        def stop(doing, done, total, **told):
            if done == step:
                raise SystemExit(130)

        with monkeypatch.context() as patch:
            patch.setattr(console, "progress_bar", lambda quiet: nullcontext(stop))
            done = finetune(*options, **places)
        assert done.status == 130
        assert done.err.startswith("recall: interrupted; what is done is kept: run the same")

    return run


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def loss_in_torch(model) -> float:
    """Mean over the completions and their ends."""
    total = count = 0.0
    for row in ROWS:
        prompt, text = ([ord(c) - 30 for c in row[part]] for part in ("prompt", "completion"))
        ids = torch.tensor([[*prompt, *text, 1]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * (len(text) + 1)
        count += len(text) + 1
    return total / count


@pytest.mark.eight_devices
def test_what_is_written_is_a_model_that_has_learnt(finetune, toys, tmp_path, data):
    before = AutoModelForCausalLM.from_pretrained(toys.llama[0])
    done = finetune("--validation-share", 0.2, "--evaluate-every", 5)
    assert (done.status, done.err) == (0, "")
    assert "20 rows and 5 to validate on, 10 steps of 5 rows, on 1 of 8 devices (cpu)" in done.out
    out = tmp_path / "out"
    record = json.loads((out / "training.json").read_text())
    after, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    assert loss_in_torch(after) < 0.7 * loss_in_torch(before)
    assert record["losses"][0] == pytest.approx(loss_in_torch(before), rel=0.2)
    assert [step for step, _ in record["validation_losses"]] == [5, 10]
    assert record["best_step"] == 10 and len(record["losses"]) == record["steps"] == 10
    assert record["data"]["rows"] == 20 and record["validation"]["rows"] == 5
    assert record["data"]["tokens_counted"] == 20 * 3
    assert record["settings"]["learning_rate"] == 0.02
    copied = {path.name for path in Path(toys.llama[0]).iterdir() if "model" not in path.name}
    assert {path.name for path in out.iterdir()} == copied | {
        "model.safetensors",
        "training.json",
        "README.md",
        "checksums.json",
    }


def test_rows_by_other_names_and_packed_are_the_same_rows(finetune, data, tmp_path):
    rows = "".join(json.dumps({"q": r["prompt"], "a": r["completion"]}) + "\n" for r in ROWS)
    other = tmp_path / "other.jsonl.gz"
    other.write_bytes(gzip.compress(rows.encode()))
    names = ["--prompt-field", "q", "--completion-field", "a"]
    assert finetune(out="plain").status == finetune(*names, rows=other).status == 0
    plain, named = (
        json.loads((tmp_path / out / "training.json").read_text()) for out in ("plain", "out")
    )
    assert plain["losses"] == named["losses"] and plain["data"]["sha256"] == named["data"]["sha256"]
    refused = finetune(*names, "--field", "q", out="no")
    assert refused.status == 2 and refused.err.startswith("recall: --field and --prompt-field")
    refused = finetune("--prompt-field", "x", rows=other, out="no")
    assert refused.status == 2 and "row 0 (from 0) has no field 'x'" in refused.err


def test_what_lies_beside_the_base_goes_along(finetune, toys, tmp_path):
    base = copy_model(toys.llama[0], tmp_path / "base")
    beside = {"spm.model": "pieces", "1_Pooling/config.json": "{}", "modeling_own.py": "1 / 0"}
    for name, text in {**beside, "optimizer.pt": "x"}.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    done = finetune(model=base)
    assert done.status == 0
    assert done.err.startswith("warning: code of ") and "modeling_own.py" in done.err
    out = tmp_path / "out"
    assert {name: (out / name).read_text() for name in beside} == beside
    assert not (out / "optimizer.pt").exists()
    assert len(json.loads((out / "training.json").read_text())["warnings"]) == 1
    assert {*beside} <= json.loads((out / "checksums.json").read_text())["files"].keys()


@pytest.mark.eight_devices
def test_a_killed_run_resumes_to_the_same_bytes(finetune, killed_at, data, tmp_path):
    common = ["--save-every", 3, "--validation", data, "--evaluate-every", 4]
    assert finetune(*common, out="whole").status == 0
    killed_at(9, *common)
    work = tmp_path / ".out.recall-work"
    assert sorted(path.name for path in work.glob("*-*")) == ["best-4", "best-8", "state-6"]

    refused = finetune(*common, "--seed", 1, "--resume")
    assert refused.status == 2
    assert "the interrupted run had seed 0, not 1: go back to it, or run without" in refused.err
    refused = finetune(*common, "--mesh", "data=5", "--resume")
    assert refused.status == 2
    assert 'the interrupted run had mesh "data=1", not "data=5": go back to it' in refused.err
    moved = tmp_path / "moved.jsonl"
    shutil.copy(data, moved)
    refused = finetune(*common, "--resume", rows=moved)
    assert refused.status == 2
    assert 'the interrupted run had data "' in refused.err

    done = finetune(*common, "--resume")
    assert (done.status, done.err) == (0, "")
    assert "going on after step 6" in done.out
    assert not work.exists()
    whole, resumed = tmp_path / "whole", tmp_path / "out"
    assert (whole / "model.safetensors").read_bytes() == (
        resumed / "model.safetensors"
    ).read_bytes()
    then, now = (json.loads((out / "training.json").read_text()) for out in (whole, resumed))
    for key in ("losses", "validation_losses", "best_step", "tokens", "steps"):
        assert then[key] == now[key], key


def test_what_a_kill_left_half_written_is_written_anew(finetune, monkeypatch, tmp_path):
    def stop(*_):
        raise SystemExit(130)

    common = ["--save-every", 6, "--save-fisher"]
    with monkeypatch.context() as patch:
        patch.setattr(job, "save_anchor", stop)
        assert finetune(*common, "--shard-size", "40KB").status == 130
    assert (tmp_path / ".out.recall-work/out/model.safetensors.index.json").is_file()
    done = finetune(*common, "--resume")
    assert (done.status, done.err) == (0, "")
    out = tmp_path / "out"
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]
    assert (out / "ewc" / "fisher.safetensors").is_file()


def test_weights_too_large_for_the_dtype_asked_for_are_kept_for_a_wider_one(finetune, tmp_path):
    common = ["--learning-rate", 1e6, "--warmup", 0, "--steps", 2, "--save-every", 1]
    done = finetune(*common, "--out-dtype", "float16")
    assert done.status == 2
    (line,) = done.err.splitlines()
    assert "overflows float16: choose a wider one with --out-dtype; what is done is kept" in line
    done = finetune(*common, "--out-dtype", "bfloat16", "--resume")
    assert done.status == 0, done.err
    assert "going on after step 1" in done.out


def test_the_interrupted_work_of_another_command_is_left_alone(finetune, tmp_path):
    work = tmp_path / ".out.recall-work"
    (work / "out").mkdir(parents=True)
    merge = [journal_line({"format": 1}), journal_line({"unit": "embed"})]
    for lines in ('{"format": 1, "identity": {}}\n', journal_line({"format": 1}), "".join(merge)):
        (work / "journal.jsonl").write_text(lines)
        done = finetune("--resume")
        assert done.status == 2
        (line,) = done.err.splitlines()
        assert "what was interrupted here is another command, of another version, or dam" in line
        assert (work / "journal.jsonl").read_text() == lines


def test_of_the_best_weights_the_last_are_kept_and_those_to_resume_with(tmp_path):
    identity = {"settings": {}, "program": {}, "inputs": {}}
    checkpoints = TrainingCheckpoints(tmp_path / "journal.jsonl", identity)
    weights = {"kernel": np.ones(2, np.float32)}

    def best(*steps):
        for step in steps:
            checkpoints.save_best(weights, step)
        return sorted(path.name for path in tmp_path.glob("*-*"))

    assert best(1, 2) == ["best-2"]
    checkpoints.save(TrainState(weights, {}, np.asarray(2, np.int32)), History(best_step=2))
    assert best(3, 4) == ["best-2", "best-4", "state-2"]


def test_data_that_has_changed_meanwhile_is_refused(finetune, killed_at, tmp_path, data):
    rows = tmp_path / "rows.jsonl"
    shutil.copy(data, rows)
    killed_at(3, "--save-every", 1, rows=rows)
    rows.write_text(rows.read_text().replace("a", "f"))
    done = finetune("--save-every", 1, "--resume", rows=rows)
    assert done.status == 2
    assert "rows.jsonl is not what it was when the run was interrupted: restore it" in done.err
    assert finetune("--save-every", 1, rows=rows).out.startswith("an interrupted run was discard")


def test_a_loss_that_is_no_number_ends_in_a_line_and_a_sound_checkpoint(finetune, tmp_path):
    done = finetune("--learning-rate", 1e30, "--warmup", 0, "--save-every", 1, quick=QUICK[:2])
    assert done.status == 2
    (line,) = done.err.splitlines()
    assert " is nan at step 3: try a lower --learning-rate" in line or " at step 2: try" in line
    work = tmp_path / ".out.recall-work"
    record = json.loads((work / "journal.jsonl").read_text())
    assert f"the last checkpoint, of step {len(record['losses'])}, is sound; what is done" in line
    assert not (tmp_path / "out").exists()


def test_a_run_that_diverged_goes_on_by_smaller_steps(finetune, tmp_path):
    steps = [*QUICK[:2], "--warmup", 0, "--save-every", 1]
    assert finetune("--learning-rate", 1e30, quick=steps).status == 2
    done = finetune("--learning-rate", 1e-3, "--clip-norm", 0.5, "--resume", quick=steps)
    assert "learning_rate was 1e+30 until the interruption, and is 0.001 from here on" in done.out
    assert "clip_norm was 1.0 until the interruption, and is 0.5 from here on" in done.out
    assert "going on after step" in done.out


def test_weights_that_are_no_numbers_after_the_last_step_are_not_written(finetune, tmp_path):
    done = finetune("--learning-rate", 1e39, "--warmup", 0, "--steps", 1, "--method", "lora")
    assert done.status == 2
    (line,) = done.err.splitlines()
    assert "the weights are not finite after step 1: try a lower --learning-rate" in line
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_more_room_goes_on(finetune, disk):
    place = disk("size=500k")
    done = finetune("--save-every", 1, out=place / "out")
    assert done.status == 2
    (line,) = done.err.splitlines()
    assert "state-2: No space left on device; what is done is kept: fix the cause" in line
    disk("size=100m")
    done = finetune("--save-every", 1, "--resume", out=place / "out")
    assert done.status == 0, done.err
    assert "going on after step 1" in done.out


def test_it_stops_early_and_keeps_the_best(finetune, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "ab=", "completion": "ZZZZ"}\n')
    done = finetune("--validation", other, "--evaluate-every", 1, "--patience", 2)
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    losses = [loss for _, loss in record["validation_losses"]]
    assert record["steps"] < 10 == record["steps_planned"]
    assert record["steps"] == record["best_step"] + 2
    assert losses.index(min(losses)) + 1 == record["best_step"]
    assert f"kept: step {record['best_step']}, validation loss {min(losses):.4f}" in done.out


def test_lora_gives_an_adapter_that_peft_loads(finetune, toys, tmp_path):
    done = finetune("--method", "lora", "--lora-rank", 4, "--target-modules", "q_proj, up_proj")
    assert done.status == 0, done.err
    base = AutoModelForCausalLM.from_pretrained(toys.llama[0])
    before = loss_in_torch(base)
    model = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    assert loss_in_torch(model) < 0.95 * before
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 32, 0.1)


def test_ewc_holds_the_weights_that_mattered(finetune, toys, tmp_path):
    base = weights_of(toys.llama[0])
    assert finetune("--save-fisher", out="free").status == 0
    fisher = tmp_path / "free" / "ewc" / "fisher.safetensors"
    first = weights(tmp_path / "free")
    kept = load_file(fisher)
    np.testing.assert_array_equal(
        kept["weights.embed.embedding"], first["model.embed_tokens.weight"]
    )
    options = ["--method", "ewc", "--ewc-strength", 1e6]
    held = finetune(*options, "--ewc-fisher", fisher, model=tmp_path / "free", out="held")
    assert held.status == 0, held.err
    moved = np.abs(
        weights(tmp_path / "held")["model.embed_tokens.weight"] - first["model.embed_tokens.weight"]
    )
    mattered = kept["fisher.embed.embedding"] > np.quantile(kept["fisher.embed.embedding"], 0.99)
    free = np.abs(first["model.embed_tokens.weight"] - base["model.embed_tokens.weight"])
    assert moved[mattered].mean() < 0.3 * free[mattered].mean()
    # Online, the anchor of two tasks is one: the decayed sum of both, at the newest weights.
    running = [*options, "--ewc-decay", 0.5, "--ewc-fisher", fisher]
    for out, more in (("sum", ()), ("twice", ("--ewc-fisher", fisher))):
        done = finetune(*running, *more, "--save-fisher", model=tmp_path / "free", out=out)
        assert done.status == 0, done.err
    once, twice = (load_file(tmp_path / out / "ewc/fisher.safetensors") for out in ("sum", "twice"))
    name = "fisher.embed.embedding"
    assert np.all(once[name] >= 0.5 * kept[name])
    weight = "weights.embed.embedding"
    newest = weights(tmp_path / "sum")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(once[weight], newest)
    assert np.sum(twice[name]) > np.sum(once[name])


@pytest.mark.eight_devices
def test_rows_of_earlier_tasks_that_are_left_out_are_said(finetune, tmp_path):
    earlier = tmp_path / "earlier.jsonl"
    earlier.write_text('{"text": "ab"}\n{"prompt": "abcdefgh", "completion": "x"}\n')
    ewc = ["--method", "ewc", "--ewc-strength", 1, "--ewc-data", earlier, "--save-fisher"]
    mesh = ["--mesh", "data=2,fsdp=2,tensor=2", "--batch-size", 4, "--validation-share", 0.2]
    done = finetune(*ewc, *mesh, "--max-tokens", 8, "--steps", 2)
    assert done.status == 0
    assert "2 steps of 4 rows, on 8 of 8 devices (cpu), data=2,fsdp=2,tensor=2" in done.out
    assert f"{earlier}: 1 rows were left out, as they have no answer" in done.err


def weights_of(folder) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.specs}


BAD = {
    "method": (["--method", "qlora"], "--method qlora: use full, lora, ewc"),
    "schedule": (["--schedule", "step"], "--schedule step: use constant, linear, cosine"),
    "rate": (["--learning-rate", "nan"], "--learning-rate nan: it must be above 0"),
    "seed": (["--seed", 2**32], "--seed 4294967296: it must be below 2^32"),
    "one step": (["--steps", 1], "the only step has the learning rate 0, from which --warmup"),
    "warmup": (["--warmup", 3], "--warmup 3.0: it is a share of the steps"),
    "epochs": (["--epochs", 0], "--epochs 0: it must be at least 1"),
    "mesh": (["--mesh", "data=3,tensor=2"], "--batch-size 5 cannot be divided into 3 parts, data"),
    "model": (["--mesh", "model=2"], "--mesh model=2: one model is trained; shard it over data"),
    "no mesh": (["--mesh", "auto"], "mesh 'auto': write it such as data=2,fsdp=4,tensor=1"),
    "devices": (["--mesh", "data=99"], "needs 99 devices; there are 8"),
    "patience": (["--patience", 2], "need rows to validate on: give --validation FILE"),
    "share": (["--validation-share", 1.5], "--validation-share 1.5: it must be between 0 and 1"),
    "lora": (["--lora-rank", 8], "LoRA's options go with --method lora"),
    "targets": (["--method", "lora", "--target-modules", "c_attn"], "no linear layer 'c_attn'"),
    "ewc": (["--method", "ewc"], "--method ewc needs --ewc-strength and --ewc-fisher FILE or"),
    "decay": (["--ewc-decay", 0.9], "--ewc-decay 0.9: with --method ewc, at most 1"),
    "dtype": (["--compute-dtype", "int8"], "compute dtype 'int8': use float32 or bfloat16"),
    "data": (["--data", "none.jsonl"], "no data file none.jsonl"),
}


@pytest.mark.eight_devices
@pytest.mark.parametrize("case", BAD)
def test_a_wrong_option_is_one_line(finetune, case, tmp_path):
    options, message = BAD[case]
    done = finetune(*options)
    assert done.status == 2
    (line,) = done.err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_wrong_folders_are_one_line(finetune, toys, tmp_path, data):
    done = finetune(out=toys.folder)
    assert done.status == 2 and f"holds the input {toys.llama[0]}" in done.err
    (tmp_path / "out").mkdir()
    done = finetune()
    assert done.status == 2 and "exists: choose another folder or pass --force" in done.err
    done = finetune("--force", out=data.parent)
    assert done.status == 2 and f"holds the input {data}" in done.err
    mute = copy_model(toys.llama[0], tmp_path / "mute", eos_token_id=None)
    (mute / "generation_config.json").unlink()
    done = finetune(model=mute)
    assert done.status == 2 and "has no eos_token_id" in done.err


def test_the_dtype_asked_for_is_written_and_said_in_the_config(finetune, tmp_path):
    done = finetune("--out-dtype", "bfloat16", "--quiet")
    assert (done.status, done.out, done.err) == (0, "", "")
    assert {array.dtype.name for array in weights(tmp_path / "out").values()} == {"bfloat16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
