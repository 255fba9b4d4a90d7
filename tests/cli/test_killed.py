"""SIGKILL at any moment of a command: OUT is absent or whole, and the next run ends in its bytes.

The moments are spread over the whole life of the process, from its start to a little after its end;
then there is one before each step that changes something on disk. Signals that a command hears come
before each such step too, and leave nothing.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from toys import SIZES, TIMED, environment, make_tokenizer, tree, write_rows

from recall_jax.experiments.demo.material import CHECKPOINTS
from recall_jax.jobs.verify import verify

SOAK = [pytest.mark.soak, pytest.mark.timeout(1800)]
RECALL = str(Path(sys.executable).with_name("recall"))
# large enough that the walk is no mere moment
DEEP = SIZES | {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 12}

# While transformers loads a model it replaces a method of all models, and two threads at once can
# leave the replacement behind: no model of a later test had its ends tied.
LOADING = threading.Lock()


@dataclass(frozen=True)
class Job:
    """A command without its OUT, and what it comes to when nothing disturbs it."""

    words: Sequence[str]
    cache: Path
    resume: Sequence[str] = ("--resume",)  # none where it begins again
    seconds: float = 0.0
    whole: Mapping[str, bytes | None] = field(default_factory=dict)

    def run(
        self, out: Path, *options: str, seconds: float | None = None
    ) -> subprocess.CompletedProcess[str]:
        """The command as a user runs it, killed after `seconds` if it still runs."""
        command = [RECALL, *self.words, str(out), *options]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(self.cache)
        )
        try:
            texts = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            texts = process.communicate()
        return subprocess.CompletedProcess(
            command, process.returncode, *(text.decode() for text in texts)
        )


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """Three relatives in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**DEEP)).to(torch.bfloat16)
    for k in range(3):
        model.save_pretrained(folder / str(k))
        make_tokenizer().save_pretrained(folder / str(k))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    return [str(folder / str(k)) for k in range(3)]


def merged(method: str, models: Sequence[str], folder: Path) -> list[str]:
    """A linear merge, or a RECALL merge that chooses its typical samples."""
    if method == "linear":
        entries = [{"model": model, "parameters": {"weight": 0.3}} for model in models]
        values = {"models": entries, "out_dtype": "float32"}
    else:
        rows = random.Random(0)
        texts = ["".join(rows.choices("abcdef XYZ01", k=rows.randint(10, 60))) for _ in range(48)]
        data = str(write_rows(folder / "data.jsonl", texts))
        entries = [{"model": model} for model in models[:2]]
        values = {"models": entries, "samples": {"data": data, "count": 8}}
    recipe = folder / "recipe.yml"
    recipe.write_text(json.dumps({"merge_method": method} | values))
    return ["merge", str(recipe), "--shard-size", "4MB"]


# Elsewhere the others are stopped at chosen points: a conversion below, a training in
# test_finetune_command, an evaluation in test_evaluate, and each after its last byte in
# test_leftovers.
COMMANDS = [
    "recall",
    *(pytest.param(name, marks=SOAK) for name in ("linear", "convert", "finetune", "evaluate")),
]


@pytest.fixture(scope="module", params=COMMANDS)
def job(request, models, toys, cache, tmp_path_factory) -> Job:
    """A command that takes a while, run before so that its programs are compiled."""
    folder = tmp_path_factory.mktemp(request.param)
    resume = ["--resume"]
    match request.param:
        case "convert":
            words, resume = ["convert", models[0], "--dtype", "float32", "--shard-size", "4MB"], []
        case "finetune":
            words = ["finetune", toys.llama[0], "--data", toys.data, "--steps", "24"]
            words += ["--save-every", "3", "--validation-share", "0.2", "--out"]
        case "evaluate":
            shipped = [str(CHECKPOINTS / name) for name in ("base", "reverse")]
            words = ["evaluate", *shipped, "--tasks", "strings_reverse,strings_sort"]
            words += ["--limit", "20", "--out"]
        case method:
            words = merged(method, models, folder)
    job = Job(words, cache, resume)
    assert job.run(folder / "first" / "out").returncode == 0  # compiles the programs
    start = time.monotonic()
    outs = [folder / name / "out" for name in ("a", "b")]
    with ThreadPoolExecutor(2) as pool:  # as they will run below
        assert [done.returncode for done in pool.map(job.run, outs)] == [0, 0]
    seconds = time.monotonic() - start
    whole = untimed(folder / "first" / "out")
    assert len(whole) > 3
    assert all(untimed(out) == whole for out in outs)
    return replace(job, seconds=seconds, whole=whole)


@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=SOAK)])
def test_a_killed_command_is_run_again_to_the_identical_bytes(kills, job, toys, tmp_path):
    chance = random.Random(kills)

    def moment(number: int) -> float:
        """Uniform over the life of the process; together the kills cover it evenly."""
        return 1.1 * job.seconds * (number + chance.random()) / kills

    trials = []
    for number in range(kills):
        moments = [moment(number)]
        if number % 3 == 1:  # the next run is killed too
            moments.append(moment(chance.randrange(kills)))
        old = Path(toys.llama[0]) if number % 2 else None
        trials.append((job, tmp_path / str(number), moments, old))
    with ThreadPoolExecutor(2) as pool:
        caught = list(pool.map(lambda trial: kill_and_run_again(*trial), trials))
    if kills >= 40:  # some moments were in the midst of the work
        assert any(caught)


def kill_and_run_again(job: Job, folder: Path, moments: Sequence[float], old: Path | None) -> bool:
    """Kill a command, run it again and kill that at each further moment, then let it end.

    It replaces `old` where that is given. Returns whether the last run found something to go on
    with, or to sweep.
    """
    out = folder / "out"
    options: list[str] = []
    if old is not None:
        shutil.copytree(old, out)
        options = ["--force"]
    for seconds in [*moments, None]:
        finished = old is None and out.exists()  # the kill came between publishing and the end
        left = out.with_name(".out.recall-work").exists()
        done = job.run(out, *options, seconds=seconds)
        killed = done.returncode == -signal.SIGKILL
        assert killed or done.returncode == (2 if finished else 0), done
        assert (f"{out} exists" in done.stderr) == (finished and not killed)
        if not (tree(out) == tree(old) if old else not out.exists()):
            assert_whole(out, job.whole)
        options = [*options, *job.resume]
    assert not killed
    assert_whole(out, job.whole)
    assert os.listdir(folder) == ["out"]
    shutil.rmtree(folder)
    return left


# Merges in forks of one process, which spares them the imports. Each is killed before a step on
# disk, and tells its end; merge 0 lives, and prints its steps.
STEPS = """
import os, signal, sys
import recall_jax.engine.stream, recall_jax.jobs.merge, recall_jax.report.page
from recall_jax.cli.main import main

place, chosen, recipe, *options = sys.argv[1:]

def is_step(event, arguments):
    if event == "ctypes.dlsym":
        return arguments[1] == "renameat2"
    if event in {"os.remove", "os.rmdir"} and not os.path.isabs(arguments[0]):
        return True  # of shutil.rmtree
    if event in {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}:
        return str(arguments[0]).startswith(folder)

def step(event, arguments):
    if is_step(event, arguments):
        steps.append(event)
        if len(steps) == last:
            os.kill(os.getpid(), signal.SIGKILL)

for last in map(int, chosen.split(",")):
    folder, steps = f"{place}/{last}", []
    if child := os.fork():
        print(last, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    sys.addaudithook(step)
    try:
        main(["merge", recipe, f"{folder}/out", *options])
    finally:
        print(*steps, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the rename is Linux's")
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("every", [20, pytest.param(1, marks=SOAK)])
def test_a_kill_before_any_step_leaves_what_was_or_what_is_to_be(
    every, existing, toys, recall, cache, tmp_path
):
    recipe = tmp_path / "recipe.yml"
    models = [{"model": model} for model in toys.qwen2]
    recipe.write_text(json.dumps({"merge_method": "average", "models": models}))
    options = ["--shard-size", "20KB", "--quiet", *["--force"] * existing]
    before = tree(Path(toys.llama[0])) if existing else {}

    def run(*chosen: int) -> list[str]:
        """Merge once for each kill; the lines that were printed."""
        for last in chosen:
            if existing:
                shutil.copytree(toys.llama[0], tmp_path / str(last) / "out")
        numbers = ",".join(map(str, chosen))
        done = subprocess.run(
            [sys.executable, "-c", STEPS, tmp_path, numbers, recipe, *options],
            capture_output=True,
            text=True,
            env=environment(cache),
            timeout=600,
        )
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout.splitlines()

    printed, end = run(0)
    assert end == "0 0"
    steps = printed.split()
    published = steps.index("ctypes.dlsym") + 1
    whole = untimed(tmp_path / "0" / "out")
    chosen = {*range(1, len(steps) + 1, every), *range(published, published + 3), len(steps)}
    assert run(*chosen) == [f"{last} {-signal.SIGKILL}" for last in chosen]
    for last in chosen:
        out = tmp_path / str(last) / "out"
        if last <= published:
            assert tree(out) == before
        else:
            assert_whole(out, whole)
        finished = not existing and last > published
        again = recall("merge", recipe, out, *options, "--resume")
        assert again.status == (2 if finished else 0), again
        assert_whole(out, whole)
        assert os.listdir(out.parent) == ["out"]


# Conversions, each stopped by a signal before another step, and by others as it clears up.
STOPPED = """
import os, signal, sys
from pathlib import Path
from recall_jax.cli import main as cli

place, number = Path(sys.argv[1]), int(sys.argv[2])
at, steps = 0, 0
exec(sys.argv[3])

def step(event, arguments):
    global steps
    if at and is_step(event, arguments):
        steps += 1
        if steps >= at:
            os.kill(os.getpid(), number)

sys.addaudithook(step)
while not at or steps >= at:
    at, steps, folder = at + int(sys.argv[4]), 0, str(place / f"{at}")
    try:
        cli.main([*sys.argv[5:], f"{folder}/out"])
    except SystemExit as end:
        reached, steps = steps, 0 if steps < at else at
        print(at, end.code, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the rename is Linux's")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("every", [7, pytest.param(1, marks=SOAK)])
def test_signals_before_any_step_leave_nothing_or_the_output(every, number, toys, cache, tmp_path):
    step = STEPS[STEPS.index("def is_step") : STEPS.index("def step(")]
    words = ["convert", toys.llama[0], "--shard-size", "20KB", "--quiet"]
    command = [sys.executable, "-c", STOPPED, tmp_path, str(int(number)), step, str(every), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(cache), timeout=600
    )
    ends = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(ends) > 20 // every and ends[-1][1] == 0, done
    assert {status for _, status in ends[:-1]} <= {128 + number, 0}
    assert done.stderr.count("\n") == len([1 for _, status in ends if status])
    whole = tree(tmp_path / str(len(ends) * every - every) / "out")
    for at, status in ends:
        folder = tmp_path / str(at - every)
        found = tree(folder / "out") if (folder / "out").exists() else None
        assert found in ([whole] if not status else [None, whole]), at
        assert not folder.exists() or os.listdir(folder) == ["out"], at


def assert_whole(out: Path, whole: Mapping[str, bytes | None]) -> None:
    from transformers import AutoModelForCausalLM

    found = untimed(out)
    assert found.keys() == whole.keys()
    assert [name for name in whole if found[name] != whole[name]] == []
    if "config.json" in whole:
        assert verify(out).faults == ()
        with LOADING:
            AutoModelForCausalLM.from_pretrained(out)


def untimed(out: Path) -> dict[str, bytes | None]:
    timed = TIMED | {"training.json"}
    return {name: content for name, content in tree(out).items() if name not in timed}
