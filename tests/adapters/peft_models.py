"""Small bases and adapters as transformers and peft write them, and what the two make of them."""

import json
import warnings
from functools import partial
from pathlib import Path

import jax
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from toys import SIZES, make_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from recall_jax.models import forward

IDS = np.arange(12, dtype=np.int32)[None] * 7 % SIZES["vocab_size"]


def save_base(folder: Path, *, tied: bool, dtype: torch.dtype = torch.float32) -> str:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen2Config(**SIZES, tie_word_embeddings=tied, eos_token_id=1)
    Qwen2ForCausalLM(config).to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def load(base: str | Path, vocab_size: int | None = None) -> PreTrainedModel:
    """The model in float32, with tokens more than it has where `vocab_size` says so."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if vocab_size is not None:
        torch.manual_seed(1)
        model.resize_token_embeddings(vocab_size)
    return model.eval()


def save_adapter(
    base: str, folder: Path, *, size: float = 0.05, vocab_size: int | None = None, **options: object
) -> str:
    """An adapter of the base whose trained parameters have moved by about `size`."""
    with warnings.catch_warnings(action="ignore"):  # peft's own affairs
        model = get_peft_model(
            load(base, vocab_size), LoraConfig(**{"r": 4, "lora_alpha": 8, **options})
        )
        generator = torch.Generator().manual_seed(len(str(folder)))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += size * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder)
    return str(folder)


def adapted(base: str, adapter: str, vocab_size: int | None = None) -> torch.nn.Module:
    """The model that was trained: the adapter beside the base, not merged into it."""
    with warnings.catch_warnings(action="ignore"):
        return PeftModel.from_pretrained(load(base, vocab_size), adapter).eval()


def merged(base: str, *adapters: str) -> torch.nn.Module:
    """The base in float32 with one adapter after the other merged into it by peft."""
    model = load(base)
    with warnings.catch_warnings(action="ignore"):
        for adapter in adapters:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.eval()


def logits(model: torch.nn.Module) -> np.ndarray:
    """Of the IDS, (1, T, V)."""
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(IDS).long()).logits.numpy()


@partial(jax.jit, static_argnames="arch")
def our_logits(arch, params):
    """The same of a model that we hold in memory."""
    _, normed = forward.forward(arch, params, IDS, np.ones_like(IDS))
    return forward.logits(arch, params, normed)


def parameters(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}


def tensors(folder: str | Path) -> dict[str, np.ndarray]:
    """What a command wrote, as safetensors itself reads it."""
    return load_file(Path(folder, "model.safetensors"))


def config(folder: str | Path) -> dict[str, object]:
    return json.loads(Path(folder, "config.json").read_text())


def recipe(method: str, *models: str, base: str | None = None, **settings: object) -> str:
    """A recipe in the working directory; its name."""
    text = {"merge_method": method, "models": [{"model": model} for model in models], **settings}
    Path("recipe.yml").write_text(json.dumps(text | ({"base_model": base} if base else {})))
    return "recipe.yml"
