"""Opening models: what transformers saves reads back whole, and nothing unsafe or half opens."""

import hashlib
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

from recall_jax.checkpoint import hub
from recall_jax.checkpoint.companions import copy_companions
from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.writer import ShardedWriter
from recall_jax.errors import InputError

INDEX = "model.safetensors.index.json"
A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.arange(4).astype(ml_dtypes.bfloat16)


def make_model(folder: Path, **tensors: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    safetensors.numpy.save_file(tensors or {"a": A, "b": B}, folder / "model.safetensors")
    return folder


def make_sharded(folder: Path, weight_map: object | None = None) -> Path:
    """A model of two shards, `1` with tensor a and `2` with tensor b."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    safetensors.numpy.save_file({"a": A}, folder / "1")
    safetensors.numpy.save_file({"b": B}, folder / "2")
    weight_map = {"a": "1", "b": "2"} if weight_map is None else weight_map
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_checkpoint_says_what_it_is_and_counts_what_it_reads(tmp_path):
    folder = make_model(tmp_path / "model")
    model = open_checkpoint(str(folder))
    assert (model.name, model.folder, model.adapters) == (str(folder), folder, ())
    assert model.config == {"model_type": "llama"}
    assert dict(model.specs) == {"a": TensorSpec(A.dtype, (2, 3)), "b": TensorSpec(B.dtype, (4,))}
    assert (model.nbytes, model.bytes_read) == (32, 0)
    np.testing.assert_array_equal(model.read("a"), A)
    assert model.bytes_read == 24
    np.testing.assert_array_equal(model.read("b"), B)
    assert model.bytes_read == 32
    with pytest.raises(KeyError):
        model.read("c")


def test_shards_read_as_one(tmp_path):
    model = open_checkpoint(make_sharded(tmp_path / "model"))
    assert list(model.specs) == ["a", "b"]
    np.testing.assert_array_equal(model.read("a"), A)
    np.testing.assert_array_equal(model.read("b"), B)


def test_bin_shards_read_as_one(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-1.bin")
    torch.save({"b": torch.zeros(3, dtype=torch.bfloat16)}, tmp_path / "pytorch_model-2.bin")
    weight_map = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model = open_checkpoint(tmp_path)
    assert model.specs["b"] == TensorSpec(np.dtype(ml_dtypes.bfloat16), (3,))
    np.testing.assert_array_equal(model.read("a"), np.ones(2))
    assert model.bytes_read == 8


def test_of_several_weights_the_ones_transformers_would_load_are_read(tmp_path):
    folder = make_sharded(tmp_path / "model")
    torch.save({"w": torch.ones(1)}, folder / "pytorch_model.bin")
    assert list(open_checkpoint(folder).specs) == ["a", "b"]
    safetensors.numpy.save_file({"single": A}, folder / "model.safetensors")
    assert list(open_checkpoint(folder).specs) == ["single"]
    for name in ("model.safetensors", INDEX):
        (folder / name).unlink()
    assert list(open_checkpoint(folder).specs) == ["w"]


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.mark.parametrize("shard_size", ["10KB", "1GB"])
def test_a_transformers_model_goes_through_bit_for_bit(llama, shard_size, tmp_path):
    from transformers import AutoModelForCausalLM

    llama.save_pretrained(tmp_path / "in", max_shard_size=shard_size)
    model = open_checkpoint(tmp_path / "in")
    state = llama.state_dict()
    assert set(model.specs) == set(state)
    for name, tensor in state.items():
        bits = tensor.view(torch.int16).numpy()
        np.testing.assert_array_equal(model.read(name).view(np.int16), bits)
    assert model.bytes_read == model.nbytes

    out = tmp_path / "out"
    out.mkdir()
    copy_companions(tmp_path / "in", out)
    with ShardedWriter(out, model.specs, 10_000 if shard_size == "10KB" else 10**9) as writer:
        for name in model.specs:
            writer.write(name, model.read(name))
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name])


# ------------------------------------------------------------------------------ bad folders


def test_folders_that_are_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "config.json").write_text("{}")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for spec, message in {
        "none": "no model folder 'none'",
        "./none": "no model folder './none'",
        str(tmp_path / "none"): "no model folder",
        "model/none": "no folder 'model/none' here",
        "a/b/c": "no model folder 'a/b/c'",
        "x" * 300: "no model folder",
        "": "without a name",
        "model+": "without a name",
        "+model": "without a name",
        "model+none": "no model folder 'none'",
        "model/config.json": "is a file",
        "empty": r"empty has no config\.json",
        "weightless": r"weightless has no weights: none of model\.safetensors",
        "adapter": r"adapter is an adapter: write BASE\+adapter",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            open_checkpoint(spec)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[1]", "holds list, not a JSON object"),
        (b"null", "holds NoneType, not a JSON object"),
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}", "nested more than 100 levels"),
        (b'{"a": ' + b'{"a": ' * 99_999, "nested more than 100 levels"),
        (b'{"a": ' + b"9" * 400 + b"}", "a number of 400 digits"),
        (b'{"a": -' + b"9" * 9999 + b"}", "a number of 10,000 digits"),
        (b'{"transformers_weights": "x.safetensors"}', "transformers_weights is not supported"),
    ],
)
def test_configs_that_are_none(config, message, tmp_path):
    folder = make_model(tmp_path / "model")
    (folder / "config.json").write_bytes(config)
    with pytest.raises(InputError, match=rf"config\.json.*{message}"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ([], "has no weight_map"),
        ({}, "has no weight_map"),
        ({"a": "1", "b": 2}, "tensor 'b' is in 2"),
        ({"a": "1", "b": "3"}, "names '3', which is missing"),
        ({"a": "1", "b": ""}, "tensor 'b' is in ''"),
        ({"a": "1", "b": "../2"}, "tensor 'b' is in '../2'"),
        ({"a": "1", "b": ".."}, "names '..', which is missing"),
        ({"a": "1", "b": "./2"}, "tensor 'b' is in './2'"),
        ({"a": "1", "b": "sub/2"}, "tensor 'b' is in 'sub/2'"),
        ({"a": "1", "b": "/etc/passwd"}, "tensor 'b' is in '/etc/passwd'"),
        ({"a": "1", "b": "2\0"}, "which is missing"),
        ({"a": "1", "b": "1"}, "1 lacks the tensor 'b'"),
        ({"a": "2", "b": "1"}, "1 lacks the tensor 'b'"),
        ({"a": "1", "b": "2", "c": "2"}, "2 lacks the tensor 'c'"),
        ({"b": "2"}, None),
        ({"a": "1"}, None),
    ],
)
def test_indices_that_do_not_fit_their_shards(weight_map, message, tmp_path):
    (tmp_path / "2").write_bytes(b"outside")
    folder = make_sharded(tmp_path / "model", weight_map)
    if message is None:  # a file of no tensor of ours beside the model is no fault
        assert set(open_checkpoint(folder).specs) == set(weight_map)
        return
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(folder)
    assert INDEX in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_index_linked_in_from_elsewhere_finds_the_shards_of_this_folder(tmp_path):
    elsewhere = make_sharded(tmp_path / "elsewhere")
    folder = make_sharded(tmp_path / "model")
    safetensors.numpy.save_file({"a": A + 1}, folder / "1")
    (folder / INDEX).unlink()
    (folder / INDEX).symlink_to(elsewhere / INDEX)
    np.testing.assert_array_equal(open_checkpoint(folder).read("a"), A + 1)


def test_a_malformed_shard_is_named(tmp_path):
    folder = make_sharded(tmp_path / "model")
    (folder / "2").write_bytes((folder / "2").read_bytes()[:-1])
    with pytest.raises(InputError, match="model/2 is truncated"):
        open_checkpoint(folder)


# --------------------------------------------------------------------------------- adapters

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)
PROJECTION = "model.layers.0.self_attn.q_proj"


def make_adapter(folder: Path, scale: float = 1.0) -> Path:
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    key = f"base_model.model.{PROJECTION}.lora_"
    tensors = {
        f"{key}A.weight": np.full((1, 4), scale, np.float32),
        f"{key}B.weight": np.ones((3, 1), np.float32),
    }
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_adapters_are_folded_in_one_after_another(tmp_path):
    base = make_model(tmp_path / "base", **{f"{PROJECTION}.weight": WEIGHT, "other": A})
    one, two = make_adapter(tmp_path / "one"), make_adapter(tmp_path / "two", 10.0)
    model = open_checkpoint(f"{base}+{one}+{two}")
    assert (model.folder, model.adapters) == (base, (one, two))
    np.testing.assert_array_equal(model.read(f"{PROJECTION}.weight"), WEIGHT + 2 + 20)
    assert model.bytes_read == WEIGHT.nbytes + 2 * 4 * 7
    np.testing.assert_array_equal(model.read("other"), A)
    assert model.bytes_read == WEIGHT.nbytes + 2 * 4 * 7 + A.nbytes


def test_a_plus_in_the_name_of_a_folder_that_exists_belongs_to_it(tmp_path):
    weights = {f"{PROJECTION}.weight": WEIGHT}
    make_model(tmp_path / "base", **weights)
    whole = make_model(tmp_path / "base+more", w=A)
    adapter = make_adapter(tmp_path / "fr+en")
    assert open_checkpoint(whole).adapters == ()
    spec = f"{tmp_path}/base+{adapter}"
    assert open_checkpoint(spec).adapters == (adapter,)
    longer = make_model(tmp_path / "base+longer", **weights)
    model = open_checkpoint(f"{longer}+{adapter}+{adapter}")
    assert (model.folder, model.adapters) == (longer, (adapter, adapter))


# -------------------------------------------------------------- what was opened, and is it still


def test_a_fingerprint_names_every_file_and_outlives_json(tmp_path):
    base = make_sharded(tmp_path / "base", {f"{PROJECTION}.weight": "1", "b": "2"})
    safetensors.numpy.save_file({f"{PROJECTION}.weight": WEIGHT}, base / "1")
    adapter = make_adapter(tmp_path / "adapter")
    model = open_checkpoint(f"{base}+{adapter}")
    whole = [base / "config.json", base / INDEX, adapter / "adapter_config.json"]
    weights = [base / "1", base / "2", adapter / "adapter_model.safetensors"]
    by_times = model.fingerprint(content=False)
    found = model.fingerprint()
    assert set(found) == set(by_times) == {str(path) for path in [*whole, *weights]}
    for path in [*whole, *weights]:
        content, status = path.read_bytes(), path.stat()
        assert found[str(path)] == [len(content), f"{zlib.crc32(content):08x}"]
        if path in weights:
            header = content[8 : 8 + int.from_bytes(content[:8], "little")]
            times = [status.st_mtime_ns, status.st_ctime_ns]
            digest = hashlib.sha256(header).hexdigest()
            assert by_times[str(path)] == [len(content), *times, digest]
        else:
            assert by_times[str(path)] == found[str(path)]
    assert json.loads(json.dumps([found, by_times])) == [found, by_times]
    assert model.bytes_read == 0
    assert open_checkpoint(f"{base}+{adapter}").fingerprint() == found


@pytest.mark.parametrize("name", ["1", INDEX, "config.json"])
@pytest.mark.parametrize("content", [True, False])
def test_a_fingerprint_tells_files_of_one_size_and_time_apart(name, content, tmp_path):
    folder = make_sharded(tmp_path / "model", {"a": "1", "b": "2"})
    (folder / "config.json").write_text('{"x": 1}')
    before = open_checkpoint(folder).fingerprint(content=content)
    path = folder / name
    status = path.stat()
    if name == "1":
        safetensors.numpy.save_file({"a": A + 1}, path)
    else:
        path.write_text(path.read_text().replace('": ', '" :', 1))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = open_checkpoint(folder).fingerprint(content=content)
    assert {path for path in before if before[path] != after[path]} == {str(folder / name)}
    assert before[str(folder / name)][0] == after[str(folder / name)][0]


def test_a_fingerprint_follows_links_to_what_they_point_to(tmp_path):
    folder = make_model(tmp_path / "model")
    (tmp_path / "link").symlink_to(folder)
    linked = open_checkpoint(tmp_path / "link").fingerprint()
    assert linked == open_checkpoint(folder).fingerprint()


def test_a_bin_has_a_fingerprint_without_a_header(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, path)
    model = open_checkpoint(tmp_path)
    status = path.stat()
    times = [status.st_mtime_ns, status.st_ctime_ns]
    by_times = model.fingerprint(content=False)
    assert by_times[str(path)] == [status.st_size, *times, None]
    crc = zlib.crc32(path.read_bytes())
    assert model.fingerprint()[str(path)] == [status.st_size, f"{crc:08x}"]
    assert model.changed() is None
    model.drop("a")
    path.touch()
    assert model.changed() is None
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert model.changed() == path


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    status = path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize(
    "change",
    [Path.touch, Path.unlink, replace, lambda path: os.truncate(path, 20)],
    ids=["touched", "gone", "replaced", "cut short"],
)
@pytest.mark.parametrize("name", ["base/2", "adapter/adapter_model.safetensors"])
def test_a_weight_file_that_changes_is_noticed(name, change, tmp_path):
    base = make_sharded(tmp_path / "base", {f"{PROJECTION}.weight": "1", "b": "2"})
    safetensors.numpy.save_file({f"{PROJECTION}.weight": WEIGHT}, base / "1")
    model = open_checkpoint(f"{base}+{make_adapter(tmp_path / 'adapter')}")
    model.read("b")
    assert model.changed() is None
    change(tmp_path / name)
    assert model.changed() == tmp_path / name


@pytest.mark.parametrize("change", [Path.touch, replace, Path.unlink], ids=lambda c: c.__name__)
def test_a_weight_file_of_known_content_is_held_to_that(change, tmp_path):
    folder = make_model(tmp_path / "model")
    model, path = open_checkpoint(folder), folder / "model.safetensors"
    model.fingerprint()
    change(path)
    if change is Path.unlink:
        assert model.changed() == path
        return
    assert model.changed() is None
    np.testing.assert_array_equal(model.read("a"), A)
    status = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(InputError, match="was changed while it was being read"):
        model.read("a")
    assert model.changed() == path


def test_dropping_a_tensor_changes_nothing(tmp_path):
    base = make_model(tmp_path / "base", **{f"{PROJECTION}.weight": WEIGHT, "other": A})
    model = open_checkpoint(f"{base}+{make_adapter(tmp_path / 'adapter')}")
    for name in model.specs:
        before = model.read(name).copy()
        model.drop(name)
        np.testing.assert_array_equal(model.read(name), before)
    assert model.changed() is None


# -------------------------------------------------------------------------------------- hub


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache with the model org/name in it, laid out in links as the hub's own is."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    model = make_model(tmp_path / "blobs")
    root = tmp_path / "cache" / "models--org--name"
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    for file in model.iterdir():
        (snapshot / file.name).symlink_to(file)
    return snapshot


def test_a_hub_model_in_the_cache_needs_no_network(cache):
    model = open_checkpoint("org/name")
    assert (model.name, model.folder) == ("org/name", cache)
    np.testing.assert_array_equal(model.read("a"), A)


def test_a_hub_model_takes_an_adapter(cache, tmp_path):
    (cache / "model.safetensors").unlink()
    safetensors.numpy.save_file({f"{PROJECTION}.weight": WEIGHT}, cache / "model.safetensors")
    adapter = make_adapter(tmp_path / "adapter")
    model = open_checkpoint(f"org/name+{adapter}")
    np.testing.assert_array_equal(model.read(f"{PROJECTION}.weight"), WEIGHT + 2)


@pytest.mark.parametrize("spec", ["org/none", "a--b/c", "org/name.", "org/x..y"])
def test_a_model_the_hub_does_not_have_is_one_line(spec, cache):
    with pytest.raises(InputError, match=f"no folder '{spec}' here, and the .* hub") as caught:
        open_checkpoint(spec)
    assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_is_given_up(cache, monkeypatch):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(hub, "_TIMEOUT_S", 0.1)
        with pytest.raises(InputError, match=r"cannot be reached \(ReadTimeout\)"):
            open_checkpoint("org/none")


def test_the_room_imports_nothing_heavy():
    code = """
import sys
import recall_jax.checkpoint.folder, recall_jax.checkpoint.writer, recall_jax.files.output
print({"jax", "torch", "transformers", "huggingface_hub", "safetensors"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
