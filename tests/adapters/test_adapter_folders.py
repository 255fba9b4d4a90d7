"""Adapters as their folders lie about: named alone, beside a config.json, of a base on the hub."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from numpy.testing import assert_allclose
from peft_models import load, logits, merged, recipe, save_adapter, save_base, tensors
from toys import tree

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.checkpoint.lora_save import Factors
from recall_jax.checkpoint.lora_save import save_adapter as write_adapter
from recall_jax.errors import InputError

LINEAR = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with `base`, and `adapter`, which names it by a path relative to here."""
    folder = tmp_path_factory.mktemp("made")
    base = save_base(folder / "base", tied=True)
    save_adapter(base, folder / "adapter", target_modules=LINEAR, rank_pattern={"q_proj": 2})
    name(folder / "adapter", "base")
    return folder


def name(adapter: Path, base: str | None, **options: object) -> None:
    """Have an adapter's config name its base so."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": base, **options}
    path.write_text(json.dumps(config))


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    """A copy of both, to work in."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def hub(here, monkeypatch) -> Path:
    """The base as org/name in the cache of the hub, and nowhere else."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(here / "cache"))
    root = here / "cache" / "models--org--name"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir()
    shutil.move(here / "base", snapshot)
    return snapshot


def test_an_adapter_named_alone_stands_on_its_base(made, here, recall) -> None:
    assert recall("convert", "adapter", "out").status == 0
    expected = merged("base", "adapter")
    assert_allclose(logits(load("out")), logits(expected), rtol=0, atol=1e-5)
    assert open_checkpoint("adapter").adapters == (Path("adapter"),)

    assert recall("merge", recipe("average", "base", "adapter"), "average").status == 0
    name_of = "model.layers.1.mlp.down_proj.weight"
    half = (load("base").get_parameter(name_of) + expected.get_parameter(name_of)) / 2
    assert_allclose(tensors("average")[name_of], half.detach().numpy(), rtol=0, atol=1e-6)
    repeatable = Path("average", "recall_recipe.yml").read_text()
    assert f"{here}/base+{here}/adapter" in repeatable


def test_more_adapters_on_one_that_is_named_alone(here, recall) -> None:
    for spec, adapters in {
        "adapter+adapter": ("adapter", "adapter"),
        "base+adapter": ("adapter",),
        "base+adapter+adapter": ("adapter", "adapter"),
    }.items():
        model = open_checkpoint(spec)
        assert (model.folder.name, tuple(map(str, model.adapters))) == ("base", adapters)
    shutil.copytree("adapter", "upper")
    name(here / "upper", "adapter")
    assert open_checkpoint("upper").full_name == f"{here}/base+{here}/adapter+{here}/upper"
    name(here / "upper", "base+adapter")
    assert open_checkpoint("upper").full_name == f"{here}/base+{here}/adapter+{here}/upper"


@pytest.mark.parametrize("left", [["config.json"], ["config.json", "generation_config.json"]])
def test_what_training_leaves_beside_an_adapter_makes_it_no_model(left, here, recall) -> None:
    for file in left:
        shutil.copy(here / "base" / file, here / "adapter" / file)
    config = json.loads(Path("adapter", "config.json").read_text())
    Path("adapter", "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    Path("adapter", "optimizer.pt").write_bytes(b"")
    assert open_checkpoint("adapter").config["vocab_size"] == 97
    assert open_checkpoint("base+adapter").config["vocab_size"] == 97
    assert recall("verify", "adapter").out.startswith("adapter: good (adapter")
    assert json.loads(recall("inspect", "adapter", "--json").out)["adapter"] == "adapter"


def test_a_model_with_an_adapter_s_config_beside_it_is_a_model(here) -> None:
    shutil.copy(here / "adapter" / "adapter_config.json", here / "base" / "adapter_config.json")
    assert open_checkpoint("base").adapters == ()
    assert open_checkpoint("adapter").folder == Path("base")


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (None, "adapter is an adapter: write BASE"),
        ("", "adapter is an adapter: write BASE"),
        ("/of/another/machine", "adapter of '/of/another/machine', which is not found: write BASE"),
        ("base/config.json", "which is not found: write BASE"),
        ("nobody/has-it", "which is not found: write BASE"),
        ("adapter", "adapter is an adapter of itself"),
        (7, "base_model_name_or_path must be a name, not 7"),
        ("\x1b[31m", r"adapter of '\\x1b\[31m', which is not found"),
    ],
)
def test_a_base_that_is_not_found_is_to_be_named(base, said, here, recall) -> None:
    name(here / "adapter", base)
    with pytest.raises(InputError, match=said):
        open_checkpoint("adapter")
    before = tree(here)
    done = recall("convert", "adapter", "out")
    assert done.status == 2 and done.err.count("\n") == 1
    assert tree(here) == before
    assert open_checkpoint("base+adapter").adapters == (Path("adapter"),)


def test_two_adapters_that_name_each_other_are_refused(here) -> None:
    shutil.copytree("adapter", "other")
    name(here / "adapter", "other")
    name(here / "other", "adapter")
    with pytest.raises(InputError, match="is an adapter of itself"):
        open_checkpoint("adapter")


def test_the_base_may_be_in_the_cache_of_the_hub(hub, here, recall) -> None:
    name(here / "adapter", "org/name")
    model = open_checkpoint("adapter")
    assert (model.folder, model.full_name) == (hub, f"org/name+{here}/adapter")
    assert recall("merge", recipe("average", "org/name", "adapter"), "out").status == 0
    repeatable = Path("out", "recall_recipe.yml").read_text()
    assert "cache" not in repeatable and f"org/name+{here}/adapter" in repeatable


def test_a_revision_of_the_base_stands_apart_in_an_adapter_s_config(hub, here) -> None:
    (hub.parents[1] / "refs" / "v1").write_text("0" * 40)
    name(here / "adapter", "org/name", revision="v1")
    assert open_checkpoint("adapter").full_name == f"org/name@v1+{here}/adapter"
    name(here / "adapter", "org/name", revision="v2")
    with pytest.raises(InputError, match="adapter of 'org/name@v2', which is not found"):
        open_checkpoint("adapter")
    factors = {"model.layers.0.self_attn.q_proj": Factors(np.ones((1, 32)), np.ones((32, 1)))}
    options = {"r": 1, "alpha": 1.0, "dropout": 0.0, "use_rslora": False}
    for base, named in {
        "org/name@v1": ("org/name", "v1"),
        "org/name": ("org/name", None),
        f"{here}/a@b": (f"{here}/a@b", None),
        f"org/name@v1+{here}/adapter": (f"org/name@v1+{here}/adapter", None),
    }.items():
        write_adapter(here, factors, base_model=base, **options)
        config = json.loads((here / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == named


def test_an_adapter_trained_here_names_the_hub_s_base_as_the_hub_does(hub, here, toys, recall):
    options = ["--data", toys.data, "--steps", "1", "--batch-size", "2", "--warmup", "0"]
    done = recall("finetune", "org/name", *options, "--method", "lora", "--out", "trained")
    assert done.status == 0, done.err
    config = json.loads(Path("trained", "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/name", None)
    assert str(here / "cache") not in "".join(
        path.read_text() for path in Path("trained").glob("*") if path.suffix in (".json", ".md")
    )
    assert open_checkpoint("trained").full_name == f"org/name+{here}/trained"


def test_inspect_tells_what_an_adapter_is(here, recall) -> None:
    done = recall("inspect", "adapter")
    assert done.status == 0 and done.err == ""
    assert "adapter: LoRA adapter of base, rank 4, alpha 8" in done.out
    found = json.loads(recall("inspect", "adapter", "--json").out)
    assert found["base_model"] == "base" and found["rank"] == 4 and found["alpha"] == 8
    assert {
        target: (each["modules"], each["ranks"]) for target, each in found["targets"].items()
    } == {
        "q_proj": (3, [2]),
        "down_proj": (3, [4]),
    }
    from safetensors.numpy import load_file

    arrays = load_file("adapter/adapter_model.safetensors").values()
    assert found["parameters"] == sum(array.size for array in arrays)
    assert found["bytes"] == sum(array.nbytes for array in arrays)
    shutil.rmtree("base")  # which need not be there
    assert json.loads(recall("inspect", "adapter", "--json").out) == found


def test_inspect_of_adapters_with_more_than_factors(made, tmp_path, recall) -> None:
    options = {"use_dora": True, "modules_to_save": ["embed_tokens"], "target_modules": LINEAR}
    adapter = save_adapter(str(made / "base"), tmp_path / "dora", **options)
    found = json.loads(recall("inspect", adapter, "--json").out)
    assert found["use_dora"] and found["saved"] == ["model.embed_tokens.weight"]
    assert "DoRA" in recall("inspect", adapter).out
    name(Path(adapter), None)
    assert "a base it does not name" in recall("inspect", adapter).out
    name(Path(adapter), None, peft_type="LOHA")
    done = recall("inspect", adapter)
    assert done.status == 2 and "LOHA" in done.err
    assert np.all([file.is_file() for file in Path(adapter).glob("*.safetensors")])


def test_an_adapter_that_is_not_finite_is_named_by_all_that_read_it(made, here, toys, recall):
    from safetensors.numpy import load_file, save_file

    weights = here / "adapter" / "adapter_model.safetensors"
    arrays = load_file(weights)
    key = next(name for name in arrays if "layers.1" in name and "q_proj.lora_B" in name)
    arrays[key][0, 0] = np.inf
    save_file(arrays, weights)
    before = tree(here)
    text = recipe("average", "base", "adapter")
    for line in (
        ["convert", "adapter", "out"],
        ["merge", text, "out"],
        ["extract", "adapter", "--data", toys.data, "--pool", "4", "--out", "out.npz"],
        ["finetune", "base+adapter", "--data", toys.data, "--out", "out"],
    ):
        done = recall(*line)
        assert done.status == 2 and done.err.count("\n") == 1
        assert f"{weights.relative_to(here)}: tensor model.layers.1.self_attn.q_proj" in done.err
        assert f"{key} holds NaN or infinite values" in done.err
    assert tree(here).keys() - before.keys() == {"recipe.yml"}
