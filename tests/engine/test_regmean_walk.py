"""RegMean and RegMean++ against the same, written out on transformers' Llama with hooks."""

import copy
import json
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from toys import TIMED, tree
from transformers import LlamaConfig, LlamaForCausalLM

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.checkpoint.safetensors import SafetensorsFile
from recall_jax.checkpoint.writer import ShardedWriter
from recall_jax.engine.findings import Findings
from recall_jax.engine.forward import StreamedForward
from recall_jax.engine.linear_inputs import LinearInputs
from recall_jax.engine.needs import Needs, always
from recall_jax.engine.plan import plan_merge
from recall_jax.engine.sources import Inputs
from recall_jax.engine.stream import merge_stream
from recall_jax.errors import InputError
from recall_jax.files.progress import Clock
from recall_jax.jobs import merge as job
from recall_jax.methods.regmean import regmean
from recall_jax.models.config import read_architecture
from recall_jax.recipes.recipe import make_recipe

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": True,
    "initializer_range": 0.2,
}
ALPHA = 0.9
# of each model its own, more or fewer, shorter or longer; the second fill no batch
LENGTHS = [(9, 3, 30, 17, 5, 12, 21), (20, 6), (16, 16, 40, 8, 11)]


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    relatives = [copy.deepcopy(base).eval() for _ in LENGTHS]
    with torch.no_grad():
        for model in relatives:
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    return relatives


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for k, model in enumerate(models):
        model.save_pretrained(folder / str(k))
    return [folder / str(k) for k in range(len(models))]


@pytest.fixture(scope="module")
def rows():
    draws = np.random.default_rng(0)
    return [[draws.integers(0, 61, n).tolist() for n in lengths] for lengths in LENGTHS]


def walk(folders, rows, out, through_merged, batch_size=4):
    """Tensors of the streamed merge."""
    checkpoints = [open_checkpoint(folder) for folder in folders]
    plan = plan_merge(Inputs(checkpoints), out_dtype=None)
    arch = read_architecture(checkpoints[-1].config)
    forwards = [
        StreamedForward.prepare(arch, own, batch_size=batch_size, dtype=jnp.float32) for own in rows
    ]
    shares = np.full(len(folders), 1 / len(folders), np.float32)
    values = {name: {"weight": shares, "alpha": np.float32(ALPHA)} for name in plan.specs}
    names = [model.name for model in checkpoints]

    def values_with(unit, grams):
        own = {name: {"gram": gram} for name, gram in grams.items()}
        return {name: values[name] | own.get(name, {}) for name in plan.units[unit]}

    linear_inputs = LinearInputs(forwards, names, through_merged)
    rule = linear_inputs.rule(values_with, lambda: Findings(shares[:, None]))
    out.mkdir(parents=True)
    with ShardedWriter(out, plan.specs) as writer:
        merge_stream(
            plan,
            rule,
            writer,
            kernel=regmean,
            reference=-1,
            clock=Clock(),
            needs=Needs(full_tensors=always),
        )
    return SafetensorsFile(out / "model.safetensors")


def grams_of(model, rows, names):
    """X^T X / N of the inputs of the named linear layers (float64), row by row, without padding."""
    grams = dict.fromkeys(names, 0)
    handles = []
    for name in names:

        def add(module, inputs, name=name):
            tokens = inputs[0].double().reshape(-1, inputs[0].shape[-1])
            grams[name] = grams[name] + tokens.T @ tokens

        handles.append(model.get_submodule(name).register_forward_pre_hook(add))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    for handle in handles:
        handle.remove()
    return {name: gram / sum(map(len, rows)) for name, gram in grams.items()}


def solved(grams, weights):
    """(sum of G_k)^-1 sum of G_k W_k, for weights (out, in) as torch has them."""
    scaled = [ALPHA * gram + (1 - ALPHA) * torch.diag(torch.diag(gram)) for gram in grams]
    right = sum(gram @ weight.double().T for gram, weight in zip(scaled, weights, strict=True))
    return torch.linalg.solve(sum(scaled), right).T


def averaged(models):
    """The model of the plain mean of all parameters."""
    mean = copy.deepcopy(models[0])
    with torch.no_grad():
        for name, parameter in mean.named_parameters():
            parameter.copy_(sum(model.get_parameter(name) for model in models) / len(models))
    return mean


def linear_layers(model, within):
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(within)
    ]


def merge_linear(merged, grams, models, names):
    with torch.no_grad():
        for name in names:
            weights = [model.get_submodule(name).weight for model in models]
            new = solved([own[name] for own in grams], weights)
            merged.get_submodule(name).weight.copy_(new)


def naive_regmean(models, rows):
    merged = averaged(models)
    names = linear_layers(merged, "")
    grams = [grams_of(model, own, names) for model, own in zip(models, rows, strict=True)]
    merge_linear(merged, grams, models, names)
    return merged


def naive_plus_plus(models, rows):
    """A unit at a time: what it reads, with each model's own unit set into the merged model."""
    merged = averaged(models)
    layers = [f"model.layers.{index}" for index in range(SIZES["num_hidden_layers"])]
    for within, parts in [
        *((layer, [layer]) for layer in layers),
        ("lm_head", ["model.norm", "lm_head"]),
    ]:
        names = linear_layers(merged, within)
        grams = []
        for model, own in zip(models, rows, strict=True):
            hybrid = copy.deepcopy(merged)
            for part in parts:
                state = model.get_submodule(part).state_dict()
                hybrid.get_submodule(part).load_state_dict(state)
            grams.append(grams_of(hybrid, own, names))
        merge_linear(merged, grams, models, names)
    return merged


def assert_is(merged, expected):
    state = expected.state_dict()
    assert set(merged.specs) == set(state)
    for name, tensor in state.items():
        np.testing.assert_allclose(
            merged.read(name), tensor.numpy(), rtol=0, atol=2e-5, err_msg=name
        )


@pytest.mark.parametrize(
    ("through_merged", "naive"), [(False, naive_regmean), (True, naive_plus_plus)]
)
def test_the_walk_is_what_hooks_and_a_solver_give(
    through_merged, naive, models, folders, rows, tmp_path
):
    merged = walk(folders, rows, tmp_path / "out", through_merged)
    expected = naive(models, rows)
    assert_is(merged, expected)
    # which would say nothing if it were the plain mean
    weight = "model.layers.1.mlp.down_proj.weight"
    mean = averaged(models).state_dict()[weight].numpy()
    assert np.abs(merged.read(weight) - mean).max() > 1e-2


@pytest.mark.parametrize("through_merged", [False, True])
def test_the_order_of_the_models_does_not_matter(through_merged, folders, rows, tmp_path):
    run = partial(walk, through_merged=through_merged)
    one = run(folders, rows, tmp_path / "one")
    other = run(folders[::-1], rows[::-1], tmp_path / "other")
    for name in one.specs:
        np.testing.assert_allclose(one.read(name), other.read(name), rtol=0, atol=2e-5)


@pytest.mark.parametrize("through_merged", [False, True])
def test_identical_models_pass_bit_for_bit(through_merged, folders, rows, tmp_path):
    merged = walk([folders[0]] * 3, rows, tmp_path / "out", through_merged)
    original = SafetensorsFile(folders[0] / "model.safetensors")
    for name in merged.specs:
        np.testing.assert_array_equal(merged.read(name), original.read(name))


@pytest.fixture
def recipe_of(toys, tmp_path):
    """A recipe of three models, each with rows of its own, more or fewer."""
    entries = []
    for k, folder in enumerate(toys.qwen2):
        texts = ["abcdefgh"[k : k + n] * n for n in range(2, 7 - k)]
        data = tmp_path / f"{k}.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        entries.append({"model": folder, "data": str(data)})
    return lambda method, **keys: make_recipe({"merge_method": method, "models": entries, **keys})


@pytest.mark.parametrize("method", ["regmean", "regmean_plusplus"])
@pytest.mark.parametrize("before", ["embed", "layers.2"])
def test_an_interrupted_merge_goes_on_to_the_same_bytes(method, before, recipe_of, tmp_path):
    recipe = recipe_of(method)

    def interrupt(doing, done, total, **moved):
        if doing == before:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.merge(recipe, tmp_path / "out", progress=interrupt)
    options = job.MergeOptions(resume=True)
    report = job.merge(recipe, tmp_path / "out", options=options)
    # what waits for the writer may or may not be written
    assert report["resumed_units"] in {"embed": {0}, "layers.2": {2, 3}}[before]
    whole = job.merge(recipe, tmp_path / "whole")
    assert report["memory"]["batch_size"] == whole["memory"]["batch_size"] == 5
    one, other = (
        {name: content for name, content in tree(tmp_path / out).items() if name not in TIMED}
        for out in ("out", "whole")
    )
    assert one == other
    typical = (tmp_path / "out" / "typical.jsonl").read_text().splitlines()
    assert [json.loads(row)["model"] for row in typical] == [0] * 5 + [1] * 4 + [2] * 3


def test_alpha_without_limit_is_refused(recipe_of):
    with pytest.raises(InputError, match="alpha"):
        recipe_of("regmean", parameters={"alpha": 1.0})
