"""What commands say: results on stdout, warnings on stderr, less when quiet, more to debug."""

import io
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from toys import copy_model, write_rows

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.cli.main import main
from recall_jax.cli.wording import worded
from recall_jax.errors import InputError


def tensors(folder) -> dict[str, bytes]:
    model = open_checkpoint(folder)
    return {name: model.read(name).tobytes() for name in model.specs}


@pytest.fixture
def quick(recall, toys, tmp_path, monkeypatch):
    """`recall quick` on the llama toys: what it said, and the report."""
    monkeypatch.chdir(tmp_path)

    def run(*options, models=toys.llama, data=toys.data, out="out", status=0):
        done = recall("quick", *models, "--data", data, "--out", out, *options)
        assert done.status == status, done.err
        return done, json.loads(Path(out, "recall_report.json").read_text())

    return run


WARNED = {
    "no model is similar": ["--sigma", "1e-4"],
    "look the same": ["--sigma", "1e6"],
    "far apart": ["--sigma", "0.02"],
    "clustering is poor": ["--count", "38"],
}


@pytest.mark.parametrize("words", WARNED)
@pytest.mark.parametrize("volume", [[], ["--quiet"], ["-q"]])
def test_warnings_are_said_and_reported(words, volume, quick):
    done, report = quick(*WARNED[words], *volume)
    assert any(words in line for line in report["warnings"])
    # in the words of the command, where the report has those of its recipe
    assert done.err.splitlines() == [f"warning: {worded(line)}" for line in report["warnings"]]
    if volume:
        assert done.out == ""
    else:
        assert "2 models" in done.out and "out" in done.out
    for name in ("recall_report.html", "README.md"):
        assert words in Path("out", name).read_text()


def test_nothing_to_warn_of(quick, toys):
    done, report = quick("--count", "8")
    assert report["warnings"] == [] and done.err == ""
    for model, weights in zip(toys.llama, report["weights"], strict=True):
        assert model in done.out and f"{np.mean(weights):.3f}" in done.out
    rises = np.asarray(report["weights"])[-1, 1:-1]
    assert report["weight_rises_with_depth"] == (rises[-1] > rises[0])
    assert ("does not rise" in done.out) == (not report["weight_rises_with_depth"])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("volume", [[], ["--quiet"]])
def test_progress_is_for_terminals_only(volume, quick, toys, monkeypatch):
    done, _ = quick("--count", "8", out="plain")
    assert "layers" not in done.err
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(SystemExit):
        line = ["quick", *toys.llama, "--data", toys.data, "--out", "out", "--count", "8", *volume]
        main(line)
    shown = screen.getvalue()
    # which units are caught on screen is a matter of time
    assert (shown == "") if volume else ("5/5" in shown and " out" in shown)


def test_debug_shows_where_it_happened(recall, capfd):
    line = ["inspect", "nowhere"]
    assert recall(*line).status == 2
    with pytest.raises(InputError, match="nowhere"):
        main([*line, "--debug"])


def test_a_fault_of_ours_is_one_line_too(recall, monkeypatch, toys):
    from recall_jax.jobs import convert as conversion

    def fail(*_):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(conversion, "describe_checkpoint", fail)
    done = recall("inspect", toys.llama[0])
    assert done.status == 1
    assert done.err.startswith("recall: ") and done.err.count("\n") == 1
    assert "RuntimeError: first second" in done.err and "--debug" in done.err


def test_compiled_programs_are_kept_unless_refused(quick, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    quick("--count", "8", out="a")
    kept = Path(jax.config.jax_compilation_cache_dir)
    assert kept.parent == tmp_path / "cache" / "recall_jax" / "xla"
    quick("--count", "8", "--no-compilation-cache", out="b")
    assert not jax.config.jax_enable_compilation_cache


def test_the_forward_may_run_in_bfloat16(quick, recall):
    _, exact = quick("--count", "8", out="exact")
    _, rough = quick("--count", "8", "--compute-dtype", "bfloat16", out="rough")
    for report, dtype in ((exact, "float32"), (rough, "bfloat16")):
        assert report["settings"]["compute_dtype"] == dtype
    assert exact["similarity"] != rough["similarity"]
    if exact["typical_samples"] == rough["typical_samples"]:
        np.testing.assert_allclose(exact["similarity"], rough["similarity"], atol=0.05)
    # and its recipe repeats it
    assert recall("merge", "rough/recall_recipe.yml", "again").status == 0
    assert tensors("again") == tensors("rough")


def test_a_recipe_repeats_a_run_that_let_attributes_pass(recall, toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = [copy_model(name, tmp_path / f"odd{k}", trick=1) for k, name in enumerate(toys.llama)]
    line = ["quick", *odd, "--data", toys.data, "--out", "out", "--count", "8"]
    assert recall(*line, "--ignore-config", "trick").status == 0
    assert recall("merge", "out/recall_recipe.yml", "again").status == 0
    assert tensors("again") == tensors("out")


def test_quick_is_a_recipe_in_one_line(quick, recall, toys, tmp_path):
    options = ["--count", "5", "--pool", "30", "--max-tokens", "12", "--batch-size", "4"]
    options += ["--seed", "3", "--unit", "1", "--sigma", "0.8", "--temperature", "0.5"]
    options += ["--out-dtype", "bfloat16", "--field", "text", "--shard-size", "20KB"]
    _, report = quick(*options)
    recipe = {
        "merge_method": "recall",
        "models": [{"model": model} for model in toys.llama],
        "parameters": {"sigma": 0.8, "temperature": 0.5},
        "samples": {
            "data": toys.data,
            "count": 5,
            "pool": 30,
            "max_tokens": 12,
            "batch_size": 4,
            "seed": 3,
            "unit": 1,
            "field": "text",
        },
        "out_dtype": "bfloat16",
    }
    Path("recipe.yml").write_text(json.dumps(recipe))
    assert recall("merge", "recipe.yml", "whole", "--shard-size", "1GB").status == 0
    assert tensors("out") == tensors("whole")
    assert Path("out/recall_recipe.yml").read_text() == Path("whole/recall_recipe.yml").read_text()
    assert len(list(Path("out").glob("*.safetensors"))) > 1
    assert len(list(Path("whole").glob("*.safetensors"))) == 1
    largest = max(path.stat().st_size for path in Path("out").glob("*.safetensors"))
    assert largest < 25_000
    assert report["settings"]["samples"]["unit"] == 1


def test_data_may_come_in_any_format(quick, toys):
    import pyarrow
    import pyarrow.parquet

    texts = ["abc", "Hello, World", 'say "a"', "x y z 01", "ab"]
    write_rows(Path("rows.jsonl"), texts)
    Path("rows.json").write_text(json.dumps([{"text": text} for text in texts]))
    Path("rows.txt").write_text("\n\n".join(texts))
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    Path("rows.csv").write_text("\r\n".join(["text", *quoted]) + "\r\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), "rows.parquet")
    reports = {
        kind: quick(data=f"rows.{kind}", out=f"out-{kind}")[1]
        for kind in ("jsonl", "json", "txt", "csv", "parquet")
    }
    for kind, report in reports.items():
        assert report["weights"] == reports["jsonl"]["weights"], kind
        rows = Path(f"out-{kind}", "typical.jsonl").read_text().splitlines()
        assert [json.loads(row)["text"] for row in rows] == texts


def test_the_hub_is_not_asked_for_what_is_here(quick, toys, tmp_path):
    (tmp_path / "org").mkdir()
    for index in range(2):
        (tmp_path / "org" / str(index)).symlink_to(toys.llama[index])
    _, report = quick("--count", "8", models=["org/0", "org/1"])
    assert report["models"] == ["org/0", "org/1"]


def test_folders_above_out_are_made(quick):
    quick("--count", "8", out="deep/er/out/")
    assert sorted(path.name for path in Path("deep/er").iterdir()) == ["out"]
