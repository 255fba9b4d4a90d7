"""`recall verify`: every changed byte and every missing piece is found, and nothing else."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.numpy
import safetensors.torch
import torch
from toys import Finished, copy_model, tree

from recall_jax.checkpoint.writer import write_checksums
from recall_jax.errors import InputError
from recall_jax.jobs.verify import verify

INDEX = "model.safetensors.index.json"
CHECKSUMS = "checksums.json"


@pytest.fixture(scope="module")
def sealed(toys, tmp_path_factory) -> Path:
    """A sharded model with checksums; only to be copied."""
    folder = tmp_path_factory.mktemp("sealed") / "model"
    shutil.copytree(toys.llama[0], folder)
    write_checksums(folder)
    return folder


@pytest.fixture
def folder(sealed, tmp_path) -> Path:
    return Path(shutil.copytree(sealed, tmp_path / "model"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def assert_failed(done: Finished, folder: Path, faults: int) -> list[str]:
    """The lines of the faults, after a look at the rest of what was said."""
    assert done.status == 1
    lines = [
        line.removeprefix("  fault: ") for line in done.out.splitlines() if "  fault: " in line
    ]
    assert len(lines) == faults, done.out
    number = f"{faults} fault" + "s" * (faults > 1)
    assert done.out.startswith(f"{folder}: {number} (")
    assert done.err == f"recall: {folder} failed verification: {number}, first: {lines[0]}\n"
    return lines


# ------------------------------------------------------------------------------------- checksums


def test_what_recall_writes_is_good(recall, toys, tmp_path):
    recipe = tmp_path / "recipe.yml"
    models = [{"model": model} for model in toys.llama]
    recipe.write_text(json.dumps({"merge_method": "average", "models": models}))
    merged, orbax = tmp_path / "merged", tmp_path / "orbax"
    assert recall("merge", recipe, merged, "--shard-size", "30KB").status == 0
    assert recall("convert", toys.qwen2[0], orbax, "--to", "orbax").status == 0
    for out, kind in ((merged, "model"), (orbax, "orbax")):
        before = tree(out)
        done = recall("verify", out)
        assert (done.status, done.err) == (0, "")
        assert done.out.startswith(
            f"{out}: good ({kind}, {sum(map(os.path.isfile, out.rglob('*'))) - 1}"
        )
        assert tree(out) == before
    assert recall("verify", merged).out.count("\n") == 1


def test_a_changed_byte_in_any_file_is_found(folder):
    assert verify(folder).faults == ()
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        faults = verify(folder).faults
        assert faults, path.name
        if path.name != CHECKSUMS:
            assert f"{path.name!r} does not hold the bytes" in faults[0]
        path.write_bytes(content)
    assert verify(folder).faults == ()


def test_every_fault_is_told(recall, folder):
    first, second, third = shards(folder)[:3]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-3])
    content = bytearray(third.read_bytes())
    content[-1] ^= 0x80
    third.write_bytes(content)
    lines = assert_failed(recall("verify", folder), folder, 4)
    assert lines[0] == f"{first.name!r} is missing"
    assert re.fullmatch(rf"'{second.name}' has \d+ bytes, not the \d+ that were written", lines[1])
    assert lines[2].startswith(f"{third.name!r} does not hold the bytes that were written")
    assert lines[3].endswith(f"names {first.name!r}, which is missing")  # says the index


@pytest.mark.parametrize("page", ["README.md", "docs/use.MD", "report.html", "LICENSE", "Notice"])
def test_a_page_that_was_edited_is_a_note(page, recall, folder):
    path = folder / page
    path.parent.mkdir(exist_ok=True)
    path.write_text("a model")
    write_checksums(folder)
    assert verify(folder).notes == ()
    path.write_text("a good model")
    done = recall("verify", folder)
    assert (done.status, done.err) == (0, "")
    assert f"note: {page!r} has 12 bytes, not the 7 that were written" in done.out
    path.unlink()
    assert verify(folder).faults == () and verify(folder).notes == (f"{page!r} is missing",)


@pytest.mark.parametrize(
    "name",
    [
        "vocab.txt",
        "chat_template.jinja",
        "tokenizer.json",
        "generation_config.json",
        "rows.jsonl",
        "spm.model",
        "1_Pooling/config.json",
        "modeling_own.py",
    ],
)
def test_whatever_is_loaded_must_be_as_it_was(name, folder):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("written")
    write_checksums(folder)
    path.write_text("changed")
    assert f"{name!r} does not hold the bytes" in verify(folder).faults[0]


@pytest.mark.parametrize(
    "name",
    [
        "vocab.txt",
        "spm.model",
        "added_tokens.json",
        "chat_template.jinja",
        "generation_config.json",
        "additional_chat_templates/tool.jinja",
    ],
)
def test_a_file_of_the_tokenizer_or_of_generation_that_came_in_is_a_fault(name, folder):
    if (path := folder / name).exists():
        path.unlink()
        write_checksums(folder)
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
    assert verify(folder).faults == (f"{name!r} has no checksum, and changes what is loaded",)


def test_weights_without_a_checksum_are_a_fault_and_other_files_are_mentioned(recall, folder):
    for name in ("notes.txt", "training.py"):
        (folder / name).write_text("mine")
    (folder / ".git").mkdir()
    (folder / ".git" / "model.safetensors").write_text("no weights of this folder")
    done = recall("verify", folder)
    assert (done.status, done.err) == (0, "")
    notes = [line for line in done.out.splitlines() if "note" in line]
    assert notes == ["  note: no checksum: '.git/model.safetensors', 'notes.txt', 'training.py'"]

    added = ["adapter_config.json", "model.safetensors", "pytorch_model.bin"]
    safetensors.numpy.save_file({}, folder / "model.safetensors")
    for name in (added[0], added[2]):
        (folder / name).write_text("{}")
    faults = verify(folder).faults
    expected = [f"{name!r} has no checksum, and changes what is loaded" for name in added]
    assert list(faults[:3]) == expected


def test_files_added_to_an_orbax_tree_are_a_fault(recall, toys, tmp_path):
    out = tmp_path / "orbax"
    assert recall("convert", toys.qwen2[0], out, "--to", "orbax").status == 0
    (out / "tree" / "more").write_text("?")
    next(path for path in sorted(out.glob("tree/**/d/*")) if path.is_file()).unlink()
    faults = verify(out).faults
    assert len(faults) == 2 and "is missing" in faults[0] and "'tree/more' has no" in faults[1]


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "deep/../../outside", "", ".", "a\0b"]
)
def test_a_path_that_leaves_the_folder_is_refused(name, folder):
    (folder.parent / "outside").write_bytes(b"secret")
    values = json.loads((folder / CHECKSUMS).read_text())
    values["files"][name] = {"bytes": 6, "crc32": "00000000"}
    (folder / CHECKSUMS).write_text(json.dumps(values))
    assert verify(folder).faults == (f"{folder / CHECKSUMS}: {name!r} is no file in the folder",)


def test_links_are_followed_as_in_the_hubs_cache(folder, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in shards(folder):
        (folder / path.name).rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    assert verify(folder).faults == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: "{oops", "not valid JSON"),
        (lambda values: values | {"format": 2}, "not of format 1"),
        (lambda values: values | {"algorithm": "md5"}, "not of format 1"),
        (lambda values: values | {"files": []}, "has no files"),
        (lambda values: values | {"files": {}}, "has no files"),
        (
            lambda values: values | {"files": values["files"] | {"config.json": 3}},
            "'config.json' has no size and checksum",
        ),
    ],
)
def test_checksums_that_cannot_be_used_are_a_fault(change, words, folder):
    values = change(json.loads((folder / CHECKSUMS).read_text()))
    (folder / CHECKSUMS).write_text(values if isinstance(values, str) else json.dumps(values))
    (fault,) = verify(folder).faults
    assert words in fault and CHECKSUMS in fault and "\n" not in fault


def test_an_unreadable_file_is_a_fault(folder):
    shard = shards(folder)[0]
    shard.unlink()
    os.mkfifo(shard)  # to open it would wait for ever
    faults = verify(folder).faults
    assert faults[0] == f"{shard.name!r} is missing"


def test_progress_counts_the_files(folder):
    heard = []
    verify(folder, lambda doing, done, total: heard.append((doing, done, total)))
    files = len(list(folder.iterdir())) - 1
    by_file = [("checksums", done, files) for done in range(files + 1)]
    assert heard[: files + 1] == by_file
    tensors = heard[-1][2]
    assert heard[files + 1 :] == [("tensors", done, tensors) for done in range(tensors)]


# ------------------------------------------------------------------------------------- structure


def test_a_folder_without_checksums_is_checked_for_structure(recall, toys):
    for model in (*toys.llama, *toys.qwen2):
        done = recall("verify", model)
        assert (done.status, done.err) == (0, "")
        assert done.out.startswith(f"{model}: good (model, structure checked)\n")
        assert "note: no checksums.json: the bytes were not checked" in done.out


def test_of_an_orbax_folder_without_checksums_the_config_is_checked(recall, toys, tmp_path):
    out = tmp_path / "orbax"
    assert recall("convert", toys.qwen2[0], out, "--to", "orbax").status == 0
    (out / CHECKSUMS).unlink()
    done = recall("verify", out)
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith(f"{out}: good (orbax, config checked)\n")
    (out / "config.json").write_text("{oops")
    (line,) = assert_failed(recall("verify", out), out, 1)
    assert "not valid JSON" in line


def damage(name: str, folder: Path) -> None:
    shard = shards(folder)[0]
    if name == "shard":
        shard.unlink()
    elif name == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif name == "config":
        (folder / "config.json").unlink()
    elif name == "weights":
        for path in (*shards(folder), folder / INDEX):
            path.unlink()
    elif name == "index":
        (folder / INDEX).write_text("{}")
    elif name == "tensor":
        tensors = safetensors.numpy.load_file(shard)
        tensors.pop(min(tensors))
        safetensors.numpy.save_file(tensors, shard)
    elif name == "layers":
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 7}))


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "shard": "which is missing",
        "truncated": "is truncated",
        "config": "has no config.json",
        "weights": "has no weights",
        "index": "has no weight_map",
        "tensor": "lacks the tensor",
        "layers": "missing model.layers.3",
    }.items(),
)
def test_a_folder_that_does_not_fit_together_fails(name, words, recall, toys, tmp_path):
    folder = copy_model(toys.llama[0], tmp_path / "model")
    damage(name, folder)
    (line,) = assert_failed(recall("verify", folder), folder, 1)
    assert words in line


def test_a_family_that_is_not_known_is_said_and_no_fault(toys, tmp_path):
    folder = copy_model(toys.llama[0], tmp_path / "model", model_type="mamba")
    (folder / "tokenizer.json").unlink()
    found = verify(folder)
    assert found.faults == ()
    assert any("model_type is 'mamba'" in note for note in found.notes)
    assert "no tokenizer" in found.notes


def test_pickled_weights_are_checked_too(toys, tmp_path):
    folder = copy_model(toys.qwen2[0], tmp_path / "model")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert verify(folder).faults == ()
    torch.save({**tensors, "more": torch.ones(1)}, folder / "pytorch_model.bin")
    assert "unexpected more" in verify(folder).faults[0]


def test_without_torch_a_bin_is_not_called_broken(toys, tmp_path, monkeypatch):
    folder = copy_model(toys.qwen2[0], tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match="pip install"):
        verify(folder)


def test_an_adapter_is_checked_as_one(recall, toys, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(toys.adapter, folder)
    write_checksums(folder)
    done = recall("verify", folder)
    assert (done.status, done.err) == (0, "") and "good (adapter, " in done.out
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "IA3"}))
    faults = assert_failed(recall("verify", folder), folder, 2)
    assert "'adapter_config.json' has" in faults[0] and "IA3" in faults[1]


# ------------------------------------------------------------------------------ what is printed


def test_nothing_to_verify_is_the_users_error(recall, toys, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, words in (
        (tmp_path / "none", "does not exist"),
        (toys.data, "is a file"),
        (tmp_path / "empty", "nothing to verify"),
    ):
        done = recall("verify", path)
        assert (done.status, done.out) == (2, "")
        assert done.err.startswith(f"recall: {path} ") and words in done.err
        assert done.err.count("\n") == 1


@pytest.mark.parametrize("broken", [False, True])
def test_the_verdict_may_be_json_or_the_status_alone(broken, recall, folder):
    if broken:
        shards(folder)[0].unlink()
    plain = recall("verify", folder)
    done = recall("verify", folder, "--json")
    verdict = json.loads(done.out)
    assert verdict.keys() == {"good", "folder", "kind", "files", "nbytes", "faults", "notes"}
    assert verdict["good"] is not broken and verdict["faults"] == list(verify(folder).faults)
    assert verdict["nbytes"] >= sum(path.stat().st_size for path in shards(folder))
    quiet = recall("verify", folder, "--quiet")
    assert plain.status == done.status == quiet.status == int(broken)
    assert plain.err == done.err == quiet.err
    assert quiet.out == ""
