"""`recall plan` on recipes: what it says, and that a merge then moves these bytes."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECALL = ROOT / "configs" / "recall.yml"


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # to which the recipes' paths are relative


def planned(recall, *arguments):
    done = recall("plan", *arguments, "--json")
    assert done.status == 0, done.err
    assert done.err == ""
    return json.loads(done.out)


def test_a_plan_says_what_the_merge_then_does(recall, tmp_path):
    plan = planned(recall, RECALL, "--devices", "cpu-2")
    assert recall("merge", RECALL, tmp_path / "out", "--quiet").status == 0
    report = json.loads((tmp_path / "out" / "recall_report.json").read_text())
    assert plan["bytes"] == report["bytes"]
    assert plan["models"] == len(report["models"])
    assert plan["device_memory_allowed_bytes"] is None and plan["fits"]


def test_a_plan_for_a_pod(recall):
    plan = planned(recall, RECALL, "--devices", "v5e-16")
    assert (plan["num_devices"], plan["num_hosts"]) == (16, 4)
    sizes = plan["mesh"]
    assert sizes["data"] * sizes["fsdp"] * sizes["tensor"] * sizes["model"] == 16
    assert plan["flops"]["select"] > plan["flops"]["forward"] > 0
    assert set(plan["seconds"]["select"]) < set(plan["seconds"]["merge"])
    assert 0 < sum(plan["device_memory_bytes"].values()) < plan["device_memory_allowed_bytes"]
    assert "1.00 GB/s of storage" in plan["assumptions"]
    assert "nothing measured" in plan["assumptions"]


def test_options_change_the_plan(recall):
    first = planned(recall, RECALL, "--devices", "v5e-16")
    slow = planned(recall, RECALL, "--devices", "v5e-16", "--storage", "100MB/s")
    assert slow["seconds"]["merge"]["read"] == pytest.approx(10 * first["seconds"]["merge"]["read"])
    mesh = ["--mesh", "data=2,fsdp=4,tensor=2"]
    assert planned(recall, RECALL, "--devices", "v5e-16", *mesh)["mesh"] == {
        "model": 1,
        "data": 2,
        "fsdp": 4,
        "tensor": 2,
    }


@pytest.mark.parametrize("name", ["linear", "ties", "task_arithmetic"])
def test_methods_that_run_no_model(recall, name):
    plan = planned(recall, ROOT / "configs" / f"{name}.yml", "--devices", "h200-8")
    assert plan["flops"] == {"select": 0, "forward": 0}
    assert plan["seconds"]["select"] == {}
    inputs = plan["bytes"]["read"] / plan["bytes"]["written"]
    assert inputs == plan["models"] + (name != "linear")  # and the base


def test_the_plan_in_words(recall):
    done = recall("plan", RECALL, "--devices", "v5p-32", "--storage", "2GB/s")
    assert done.status == 0 and done.err == ""
    lines = done.out.splitlines()
    assert lines[0].startswith("recall of 4 models on v5p-32: 16 devices of 4 hosts, mesh data=")
    assert "4.20 MB read (1.05 MB by each host), 1.05 MB written" in lines
    assert lines[-1].startswith("assumed: 2.00 GB/s of storage for each host")
    assert any(line.startswith("fits the memory of a device: ") for line in lines)
    assert recall("plan", RECALL, "--devices", "v5p-32", "--quiet").out == ""


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([RECALL, "--devices", "v9-16"], "no machine 'v9-16' is known; known are v5e-N"),
        ([RECALL, "--devices", "v5e-16", "--mesh", "data=3"], "give one of as many"),
        ([RECALL, "--devices", "v5e-16", "--mesh", "rows=3"], "mesh 'rows=3': write it such as"),
        ([RECALL, "--devices", "v5e-16", "--storage", "fast"], "'fast' is no size"),
        ([ROOT / "configs" / "regmean.yml", "--devices", "v5e-16"], "plan does not know the cost"),
        ([ROOT / "configs" / "none.yml", "--devices", "v5e-16"], "cannot read"),
    ],
)
def test_a_wrong_request_is_one_line(recall, arguments, said):
    done = recall("plan", *arguments)
    assert done.status == 2 and done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("recall: ") and said in line
