"""Make models from scratch: a byte tokenizer, random weights, and a folder to save them in."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.writer import ShardedWriter
from recall_jax.files.json_objects import write_json_object
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import from_flax
from recall_jax.models.forward import init_params

END = "<|endoftext|>"
BYTES = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))


def make_byte_tokenizer(words: Sequence[str] = ()) -> Tokenizer:
    """Make a byte-level BPE tokenizer without merges, in which each of `words` is one token.

    An end-of-text token precedes every text.
    """
    ids = {token: index for index, token in enumerate(BYTES)}
    tokenizer = Tokenizer(models.BPE(ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer


def make_config(tokenizer: Tokenizer, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the config.json of a tied Llama of these sizes, for such a tokenizer."""
    end = tokenizer.token_to_id(END)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": tokenizer.get_vocab_size(),
        **sizes,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
    }


def save_random(folder: Path, sizes: Mapping[str, int], words: Sequence[str], seed: int) -> None:
    """Write a float32 model of these sizes with random weights drawn by `seed`."""
    tokenizer = make_byte_tokenizer(words)
    config = make_config(tokenizer, sizes)
    arch = read_architecture(config)
    tensors = from_flax(arch, init_params(arch, jax.random.key(seed)))
    save_model(folder, config, tensors, tokenizer, np.float32)


def save_model(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    tokenizer: Tokenizer,
    dtype: DTypeLike,
) -> None:
    """Write a model folder as transformers does, from tensors by their names on disk, (out, in)."""
    folder.mkdir(parents=True, exist_ok=True)
    cast = {name: array.astype(dtype) for name, array in tensors.items()}
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in cast.items()}
    with ShardedWriter(folder, specs) as writer:
        for name, array in cast.items():
            writer.write(name, array)
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {name: config[name] for name in special}
    write_json_object(folder / "config.json", config, indent=2)
    write_json_object(folder / "generation_config.json", generation, indent=2)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json_object(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": END,
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        },
        indent=2,
    )
