"""Models of the hub: what the cache has is kept, what it lacks is fetched, and no more."""

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import _tree_cache, constants
from own_hub import serve
from toys import environment

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.errors import InputError

ONE, TWO = (np.full((2, 3), value, np.float32) for value in (1, 2))
CONFIG = {"model_type": "llama", "tie_word_embeddings": False}


def weights(**tensors: np.ndarray) -> bytes:
    return safetensors.numpy.save(tensors)


MODEL = {
    "config.json": json.dumps(CONFIG).encode(),
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "model.safetensors": weights(a=ONE),
}
INDEX = {"metadata": {}, "weight_map": {"a": "part [1].safetensors", "b": "part-2.safetensors"}}
SHARDED = {
    **{name: content for name, content in MODEL.items() if name != "model.safetensors"},
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "part [1].safetensors": weights(a=ONE),
    "part-2.safetensors": weights(b=TWO),
}
UNUSED = {
    ".gitattributes": b"x",
    "README.md": b"x",
    "pytorch_model.bin": b"x",
    "tf_model.h5": b"x",
    "onnx/model.onnx": b"x",
    "onnx/config.json": b"x",
    "original/consolidated.00.pth": b"x",
    "original/params.json": b"x",
    "consolidated.safetensors": b"x",
    "training_args.bin": b"x",
    "runs/events.out.tfevents.1": b"x",
}
USED = {
    "modules.json": b'[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]',
    "1_Pooling/config.json": b"{}",
    "2_Dense/config.json": b"{}",
    "2_Dense/model.safetensors": b"x",
    "spm.model": b"x",
    "modeling_own.py": b"x",
    "additional_chat_templates/tool.jinja": b"x",
}


def point_to(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT does in a process that begins."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template)
    monkeypatch.setattr(constants, "ENDPOINT", url)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that answers, and a cache of its own."""
    with serve() as hub:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        point_to(monkeypatch, hub.url)
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.fixture
def offline(monkeypatch):
    def cut() -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    return cut


@pytest.fixture
def unreachable(monkeypatch):
    def cut() -> None:
        point_to(monkeypatch, "http://127.0.0.1:9")

    return cut


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def forget(folder: Path, *names: str) -> None:
    """As an interrupted download, or another library, has left it."""
    for name in names:
        (folder / name).unlink()


def forget_listing(folder: Path) -> None:
    """As a library has left it that does not keep what the hub said."""
    for path in (folder.parents[1] / "trees").glob("*.json"):
        path.unlink()
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()


# ---------------------------------------------------------------------------------- what is fetched


def test_all_that_a_merge_reads_and_copies_is_fetched_and_nothing_else(hub):
    hub.push("org/name", MODEL | USED | UNUSED)
    model = open_checkpoint("org/name")
    np.testing.assert_array_equal(model.read("a"), ONE)
    assert files(model.folder) == hub.fetched == {*MODEL, *USED}


def test_shards_are_those_that_the_index_names(hub):
    hub.push("org/name", SHARDED | UNUSED)
    model = open_checkpoint("org/name")
    np.testing.assert_array_equal(model.read("b"), TWO)
    assert hub.fetched == {*SHARDED}


def test_where_there_is_no_safetensors_pickled_weights_are_fetched(hub):
    hub.push("org/name", {"config.json": MODEL["config.json"], "pytorch_model.bin": b"x"})
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        open_checkpoint("org/name")
    assert "pytorch_model.bin" in hub.fetched


def test_a_file_too_large_to_be_copied_is_not_fetched(hub):
    hub.push("org/name", MODEL | {"rows.json": bytes(64 << 20)})
    open_checkpoint("org/name")
    assert hub.fetched == {*MODEL}


# ---------------------------------------------------------------------------------- a partial cache


@pytest.mark.parametrize(
    "lost", [["part-2.safetensors"], ["tokenizer.json"], ["config.json"], [*SHARDED]]
)
@pytest.mark.parametrize("listed", [True, False])
def test_what_a_cache_lacks_is_fetched(listed, lost, hub):
    hub.push("org/name", SHARDED | UNUSED)
    folder = open_checkpoint("org/name").folder
    forget(folder, *lost)
    if not listed:
        forget_listing(folder)
    hub.asked.clear()
    model = open_checkpoint("org/name")
    np.testing.assert_array_equal(model.read("b"), TWO)
    assert model.folder == folder and files(folder) == {*SHARDED}
    assert not any("README" in path or ".bin" in path for path in hub.asked)


def test_the_rest_is_of_the_commit_that_the_cache_has(hub):
    hub.push("org/name", SHARDED)
    folder = open_checkpoint("org/name").folder
    forget(folder, "part-2.safetensors")
    hub.push("org/name", MODEL)
    np.testing.assert_array_equal(open_checkpoint("org/name").read("b"), TWO)
    assert open_checkpoint("org/name").folder == folder


def test_a_commit_that_is_gone_is_replaced_where_the_cache_is_of_no_use(hub):
    old = hub.push("org/name", SHARDED)
    folder = open_checkpoint("org/name").folder
    hub.push("org/name", MODEL)
    del hub.revisions["org/name"][old]
    forget_listing(folder)
    assert open_checkpoint("org/name").folder == folder  # it can be used as it is
    forget(folder, "part-2.safetensors")
    np.testing.assert_array_equal(open_checkpoint("org/name").read("a"), ONE)
    assert open_checkpoint("org/name").folder != folder


def test_a_cache_with_a_tokenizer_alone_is_of_no_use_offline(hub, offline):
    hub.push("org/name", MODEL)
    folder = open_checkpoint("org/name").folder
    forget(folder, "model.safetensors")
    offline()
    with pytest.raises(InputError, match="OfflineModeIsEnabled"):
        open_checkpoint("org/name")


# ------------------------------------------------------------------------------------ a whole cache


@pytest.mark.parametrize("how", ["offline", "unreachable", "gone"])
@pytest.mark.parametrize("files_", [MODEL, SHARDED], ids=["one file", "shards"])
def test_a_cache_that_lacks_what_is_not_needed_is_whole(files_, how, hub, offline, unreachable):
    hub.push("org/name", files_ | UNUSED)
    folder = open_checkpoint("org/name").folder
    forget_listing(folder)
    if how == "gone":
        del hub.revisions["org/name"]
    else:
        {"offline": offline, "unreachable": unreachable}[how]()
    np.testing.assert_array_equal(open_checkpoint("org/name").read("a"), ONE)


def test_of_a_cache_known_to_be_whole_the_hub_is_not_asked(hub):
    hub.push("org/name", SHARDED | USED | UNUSED)
    open_checkpoint("org/name")
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    hub.asked.clear()
    np.testing.assert_array_equal(open_checkpoint("org/name").read("a"), ONE)
    assert hub.asked == []


def test_an_adapter_alone_is_whole_too(hub, offline, tmp_path):
    hub.push("org/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": weights()})
    hub.push("org/name", MODEL)
    for _ in range(2):
        with pytest.raises(InputError, match=r"adapter_config\.json"):  # it is an empty one
            open_checkpoint("org/name+org/adapter")
        forget_listing(Path(huggingface_hub.snapshot_download("org/adapter", allow_patterns=[])))
        offline()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= hub.fetched


# ---------------------------------------------------------------------------- names and revisions


def test_a_folder_of_the_organisations_name_hides_nothing(hub, tmp_path):
    (tmp_path / "org" / "other").mkdir(parents=True)
    hub.push("org/name", MODEL)
    np.testing.assert_array_equal(open_checkpoint("org/name").read("a"), ONE)
    with pytest.raises(InputError, match=r"no folder .org/none. here, and the .* hub"):
        open_checkpoint("org/none")
    asked = len(hub.asked)
    with pytest.raises(InputError, match=r"no config\.json"):  # the folder itself goes first
        open_checkpoint("org/other")
    assert len(hub.asked) == asked


@pytest.mark.parametrize("revision", ["v2", "refs/pr/1", "commit"])
def test_a_revision_is_fetched_by_its_name(revision, hub, offline):
    hub.push("org/name", MODEL)
    other = MODEL | {"model.safetensors": weights(a=TWO)}
    commit = hub.push("org/name", other, "v2" if revision == "commit" else revision)
    spec = f"org/name@{commit if revision == 'commit' else revision}"
    for _ in range(2):
        model = open_checkpoint(spec)
        assert model.name == spec
        np.testing.assert_array_equal(model.read("a"), TWO)
        np.testing.assert_array_equal(open_checkpoint("org/name").read("a"), ONE)
        offline()


@pytest.mark.parametrize("spec", ["org/name@none", "org/none@main", "org/name@"])
def test_a_revision_that_is_not_there_is_one_line(spec, hub):
    hub.push("org/name", MODEL)
    with pytest.raises(InputError, match=f"no (model )?folder '{spec}'") as caught:
        open_checkpoint(spec)
    assert "\n" not in str(caught.value)


def test_base_and_adapter_have_revisions_of_their_own(hub, toys, recall, tmp_path):
    def content(folder: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    hub.push("org/base", MODEL)
    hub.push("org/base", content(toys.llama[0]), "v1")
    hub.push("org/adapter", content(toys.adapter), "v3.1")
    spec = "org/base@v1+org/adapter@v3.1"
    expected = open_checkpoint(f"{toys.llama[0]}+{toys.adapter}")
    model = open_checkpoint(spec)
    for name in expected.specs:
        np.testing.assert_array_equal(model.read(name), expected.read(name))
    models = [{"model": "org/base@v1"}, {"model": spec}]
    (tmp_path / "recipe.yml").write_text(json.dumps({"merge_method": "average", "models": models}))
    assert recall("merge", "recipe.yml", "out").status == 0
    report = json.loads((tmp_path / "out" / "recall_report.json").read_text())
    assert report["models"] == ["org/base@v1", spec]
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_command_reads_where_the_hub_is_from_the_environment(hub, cache, tmp_path):
    hub.push("org/name", MODEL)
    places = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "own")}
    code = "from recall_jax.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", "org/name@main", "--json"],
        env=environment(cache) | places,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["model"] == "org/name@main"
