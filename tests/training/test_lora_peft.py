"""LoRA against peft on torch: the course of training, the files, the Fisher information."""

import json
import warnings
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.models.architecture import Architecture
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import from_flax, to_flax
from recall_jax.models.forward import Params, forward, logits
from recall_jax.models.lora import LoraSpec
from recall_jax.parallel.mesh import make_mesh
from recall_jax.training.ewc import fisher_of_batches
from recall_jax.training.lora import fold, init_lora, lora_loss, save_lora
from recall_jax.training.optimizer import adamw
from recall_jax.training.step import Objective, TrainingBatch, init_state, make_step

STEPS, ROWS, TOKENS, VOCABULARY = 20, 4, 12, 41
RATE, DECAY = 1e-2, 0.05
PAPER = LoraSpec()
WIDE = LoraSpec(r=3, alpha=4.5, target_modules=("all-linear",), use_rslora=True)


@dataclass(frozen=True)
class Base:
    """A model as transformers saves it, and as we hold it."""

    folder: str
    arch: Architecture
    params: Params


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lora") / "base"
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    arch = read_architecture(json.loads((folder / "config.json").read_text()))
    return Base(str(folder), arch, to_flax(arch, load_file(folder / "model.safetensors")))


def peft_model(base: Base, folder, trainable=False):
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft's own affairs
        model = AutoModelForCausalLM.from_pretrained(base.folder, attn_implementation="eager")
        return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)


def save(base: Base, folder, lora, spec):
    folder.mkdir()
    save_lora(folder, base.arch, lora, spec, base_model=base.folder)
    return folder


def draw_batch(seed: int) -> TrainingBatch:
    """Rows of different lengths, of which the first third is not counted."""
    random = np.random.default_rng(seed)
    lengths = random.integers(4, TOKENS + 1, ROWS)[:, None]
    place = np.arange(TOKENS)[None]
    ids = random.integers(0, VOCABULARY, (ROWS, TOKENS))
    masks = ids * (place < lengths), place < lengths, (place < lengths) & (place >= lengths // 3)
    return TrainingBatch(*(mask.astype(np.int32) for mask in masks))


BATCHES = [draw_batch(seed % 2) for seed in range(STEPS)]


def torch_loss(model, batch: TrainingBatch) -> torch.Tensor:
    """Summed over the counted tokens."""
    ids, attention_mask, loss_mask = (torch.tensor(array).long() for array in batch)
    scores = model(input_ids=ids, attention_mask=attention_mask).logits[:, :-1]
    labels = torch.where(loss_mask == 1, ids, -100)[:, 1:]
    return torch.nn.functional.cross_entropy(
        scores.reshape(-1, VOCABULARY), labels.reshape(-1), reduction="sum"
    )


@partial(jax.jit, static_argnames=("arch", "lora_spec"))
def our_logits(arch, params, batch, lora=None, lora_spec=None):
    _, normed = forward(
        arch, params, batch.input_ids, batch.attention_mask, lora=lora, lora_spec=lora_spec
    )
    return logits(arch, params, normed)


def test_twenty_steps_are_those_of_peft(base, tmp_path):
    spec = replace(PAPER, dropout=0.0)
    start = init_lora(base.arch, spec, jax.random.key(0))
    model = peft_model(base, save(base, tmp_path / "start", start, spec), trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * base.arch.num_hidden_layers
    theirs = torch.optim.AdamW(trained, RATE, weight_decay=DECAY)
    expected = []
    for batch in BATCHES:
        loss = torch_loss(model, batch) / int(batch.loss_mask[:, 1:].sum())
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        expected.append(loss.item())

    ours = adamw(lambda step: jnp.float32(RATE), weight_decay=DECAY)
    step = make_step(Objective(lora_loss(base.arch, spec)), ours, None)
    state, losses = init_state(start, ours), []
    for batch in BATCHES:
        parts = TrainingBatch(*(array[None] for array in batch))
        state, metrics = step(state, {"base": base.params}, parts, jax.random.key(1))
        losses.append(metrics.loss.item())
    assert_allclose(losses, expected, rtol=0, atol=1e-3)
    assert expected[-1] < expected[0] - 0.5

    after = save(base, tmp_path / "after", state.trainable, spec) / "adapter_model.safetensors"
    for name, array in load_file(after).items():
        weight = model.get_parameter(name.replace(".weight", ".default.weight")).detach()
        assert_allclose(array, weight, rtol=0, atol=1e-3, err_msg=name)


def random_lora(base: Base, spec: LoraSpec) -> Params:
    random = np.random.default_rng(5)
    shapes = jax.eval_shape(lambda: init_lora(base.arch, spec, jax.random.key(0)))
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape) * 0.3, jnp.float32), shapes
    )


@pytest.mark.parametrize("spec", [PAPER, WIDE], ids=["paper", "rslora-all-linear"])
def test_a_saved_adapter_computes_the_same_in_peft_and_folded(base, spec, tmp_path):
    lora, batch = random_lora(base, spec), BATCHES[0]
    adapter = save(base, tmp_path / "adapter", lora, spec)
    with torch.no_grad():
        ids, mask = (torch.tensor(array) for array in (batch.input_ids, batch.attention_mask))
        expected = peft_model(base, adapter)(input_ids=ids, attention_mask=mask).logits.numpy()
    is_token = batch.attention_mask == 1
    scores = our_logits(base.arch, base.params, batch, lora, spec)
    assert_allclose(scores[is_token], expected[is_token], rtol=0, atol=3e-5)
    assert np.abs(expected - our_logits(base.arch, base.params, batch))[is_token].max() > 0.1

    folded = jax.jit(partial(fold, spec=spec))(base.params, lora)
    scores = our_logits(base.arch, folded, batch)
    assert_allclose(scores[is_token], expected[is_token], rtol=0, atol=3e-5)

    checkpoint = open_checkpoint(f"{base.folder}+{adapter}")
    for name, array in from_flax(base.arch, folded).items():
        assert_allclose(checkpoint.read(name), array, rtol=0, atol=1e-6, err_msg=name)


def test_the_file_holds_the_factors_to_the_bit(base, tmp_path):
    lora = random_lora(base, WIDE)
    file = load_file(save(base, tmp_path / "adapter", lora, WIDE) / "adapter_model.safetensors")
    assert len(file) == 2 * 7 * base.arch.num_hidden_layers
    for layer in range(base.arch.num_hidden_layers):
        for block, names in {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}.items():
            for name in names:
                factors = lora["layers"][block][f"{name}_proj"]
                module = f"base_model.model.model.layers.{layer}.{block}.{name}_proj"
                assert_array_equal(file[f"{module}.lora_A.weight"], factors["a"][layer].T)
                assert_array_equal(file[f"{module}.lora_B.weight"], factors["b"][layer].T)


def test_fisher_information_of_completions_is_torch_per_row(base, tmp_path):
    lora = random_lora(base, PAPER)
    batch = TrainingBatch(
        *(np.concatenate([array, np.zeros_like(array[:2])]) for array in BATCHES[0])
    )
    found = fisher_of_batches(
        lora_loss(base.arch, PAPER), lora, {"base": base.params}, [batch, batch], make_mesh({})
    )
    model = peft_model(base, save(base, tmp_path / "adapter", lora, PAPER), trainable=True).eval()
    squares = {name: 0.0 for name, value in model.named_parameters() if value.requires_grad}
    for row in range(ROWS):
        model.zero_grad()
        torch_loss(model, TrainingBatch(*(array[row : row + 1] for array in batch))).backward()
        for name, parameter in model.named_parameters():
            if name in squares:
                squares[name] += parameter.grad.numpy() ** 2 / ROWS
    for layer in range(base.arch.num_hidden_layers):
        for name in ("q_proj", "v_proj"):
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            factors = found["layers"]["self_attn"][name]
            for ours, theirs in (("a", "lora_A"), ("b", "lora_B")):
                expected = squares[f"{module}.{theirs}.default.weight"]
                assert expected.max() > 0.01
                assert_allclose(factors[ours][layer].T, expected, rtol=1e-3, atol=1e-5)
