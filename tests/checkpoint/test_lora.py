"""Folded adapters against peft's `merge_and_unload`, and everything that is refused."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal, assert_array_max_ulp
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from recall_jax.checkpoint.lora import read_adapter
from recall_jax.checkpoint.lora_bound import BoundAdapter
from recall_jax.checkpoint.lora_config import read_lora_config
from recall_jax.checkpoint.lora_edits import LowRank
from recall_jax.checkpoint.lora_names import find_places
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.errors import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True.:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape"),
]

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0}


def qwen(tied: bool) -> PreTrainedModel:
    return randomised(Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied)))


def llama() -> PreTrainedModel:
    return randomised(LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)))


def gpt2(tied: bool) -> PreTrainedModel:
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return randomised(GPT2LMHeadModel(GPT2Config(**sizes, **TOKENS, tie_word_embeddings=tied)))


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    return model


class Case:
    """A base, an adapter of it with random weights, and peft's merge of the two, each on disk."""

    def __init__(
        self, folder: Path, base: PreTrainedModel, vocab_size: int | None = None, **options: object
    ) -> None:
        self.base, self.adapter, merged = (folder / part for part in ("base", "adapter", "merged"))
        base.save_pretrained(self.base)
        model = get_peft_model(self.load_base(vocab_size), LoraConfig(**options))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                mean = 1.0 if "magnitude" in name else 0.0
                parameter.data.normal_(mean, 0.1, generator=generator)
        model.save_pretrained(self.adapter)
        loaded = PeftModel.from_pretrained(self.load_base(vocab_size), self.adapter)
        loaded.merge_and_unload().save_pretrained(merged)
        self.merged = load_file(merged / "model.safetensors")
        self.merged_config = json.loads((merged / "config.json").read_text())

    def load_base(self, vocab_size: int | None) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(self.base)
        if vocab_size is not None:
            model.resize_token_embeddings(vocab_size)
        return model

    def base_tensors(self) -> dict[str, np.ndarray]:
        return load_file(self.base / "model.safetensors")

    def base_config(self) -> dict[str, object]:
        return json.loads((self.base / "config.json").read_text())


def reference_fold(case: Case) -> dict[str, np.ndarray]:
    """The folded q_proj, down_proj and embedding in float64: rank 8, alpha 8, hence scale 1."""
    parts = load_file(case.adapter / "adapter_model.safetensors")
    parts = {key.removeprefix("base_model.model."): a.astype(float) for key, a in parts.items()}
    folded = {}
    for name, array in case.base_tensors().items():
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in parts:
            update = parts[f"{module}.lora_B.weight"] @ parts[f"{module}.lora_A.weight"]
        elif f"{module}.lora_embedding_A" in parts:
            update = (parts[f"{module}.lora_embedding_B"] @ parts[f"{module}.lora_embedding_A"]).T
        else:
            continue
        folded[name] = array.astype(float) + update
        if (magnitude := parts.get(f"{module}.lora_magnitude_vector")) is not None:
            axis = 0 if "embed" in module else 1
            norm = np.linalg.norm(folded[name], axis=axis, keepdims=True)
            folded[name] *= np.expand_dims(magnitude, axis) / norm
    return folded


def fold_all(
    adapter: Path, tensors: dict[str, np.ndarray], config: dict[str, object]
) -> tuple[dict[str, np.ndarray], BoundAdapter]:
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in tensors.items()}
    bound = read_adapter(adapter).bind(specs, config)
    for array in tensors.values():
        array.flags.writeable = False
    folded = {
        name: bound.fold(name, tensors.get(name)) if bound.touches(name) else tensors[name]
        for name in bound.specs
    }
    for name, array in folded.items():
        spec = bound.specs[name]
        dtype = np.promote_types(spec.dtype, np.float32) if bound.touches(name) else spec.dtype
        assert (array.dtype, array.shape) == (dtype, spec.shape), name
    return folded, bound


def assert_as_merged_by_peft(case: Case) -> BoundAdapter:
    folded, bound = fold_all(case.adapter, case.base_tensors(), case.base_config())
    assert folded.keys() == case.merged.keys()
    for name, expected in case.merged.items():
        assert folded[name].dtype == expected.dtype, name
        assert_allclose(folded[name], expected, rtol=1e-6, atol=1e-7, err_msg=name)
        assert bound.touches(name) or np.array_equal(folded[name], expected), name
    for key in ("tie_word_embeddings", "vocab_size"):
        assert bound.config[key] == case.merged_config[key]
    return bound


LINEAR = ["q_proj", "v_proj", "down_proj"]
UNTIED = {
    "plain": {"target_modules": LINEAR, "r": 3, "lora_alpha": 8},
    "rslora": {"target_modules": LINEAR, "r": 3, "lora_alpha": 8, "use_rslora": True},
    "dora": {"target_modules": LINEAR, "r": 3, "lora_alpha": 8, "use_dora": True},
    "patterns": {
        "target_modules": LINEAR,
        "r": 3,
        "lora_alpha": 8,
        "rank_pattern": {"layers.1.mlp.down_proj": 5, "q_proj": 2, r"self_attn\..*": 7},
        "alpha_pattern": {r"^model\.layers\.0\..*": 3, "down_proj": 5},
    },
    "patterns with rslora": {
        "target_modules": LINEAR,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"q_proj": 3.5},
    },
    "some layers": {"target_modules": LINEAR, "layers_to_transform": [1]},
    "frozen factor": {"target_modules": LINEAR, "init_lora_weights": "mica"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding and head with dora": {
        "target_modules": ["embed_tokens", "lm_head", "q_proj"],
        "use_dora": True,
    },
    "modules_to_save": {
        "target_modules": LINEAR,
        "modules_to_save": ["embed_tokens", "lm_head", "norm", "k_proj"],
    },
    "bias of all": {"target_modules": LINEAR, "bias": "all"},
    "bias of lora only": {"target_modules": LINEAR, "bias": "lora_only"},
    "bias of lora_B": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_bias": True},
    "rows": {"target_modules": LINEAR, "trainable_token_indices": [7, 3]},
    "rows of both": {
        "target_modules": LINEAR,
        "trainable_token_indices": {"lm_head": [2, 5, 1], "embed_tokens": [7, 3]},
    },
}


@pytest.mark.parametrize("options", UNTIED.values(), ids=UNTIED.keys())
def test_fold_is_peft_merge(tmp_path: Path, options: dict[str, object]) -> None:
    assert_as_merged_by_peft(Case(tmp_path, qwen(tied=False), **options))


def test_fold_on_llama(tmp_path: Path) -> None:
    bound = assert_as_merged_by_peft(Case(tmp_path, llama(), target_modules=LINEAR, r=3))
    changed = {name.split(".")[-2] for name in bound.specs if bound.touches(name)}
    assert changed == set(LINEAR)
    # the header is not counted, and each tensor of the adapter is read once
    assert bound.bytes_read == sum(spec.nbytes for spec in bound.file.specs.values())


# where peft's merge is the model that was trained; tests/adapters has the others
TIED = {
    "neither end": {"target_modules": LINEAR},
    "head apart": {"target_modules": LINEAR, "modules_to_save": ["lm_head"]},
    "both apart": {"target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]},
    "head apart, embedding updated": {
        "target_modules": ["embed_tokens"],
        "modules_to_save": ["lm_head"],
    },
    "embedding apart, head updated": {
        "target_modules": ["lm_head"],
        "modules_to_save": ["embed_tokens"],
    },
    "saved and kept tied": {
        "target_modules": LINEAR,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "rows": {"target_modules": LINEAR, "trainable_token_indices": [7, 3]},
}


@pytest.mark.parametrize("options", TIED.values(), ids=TIED.keys())
def test_fold_of_tied_embeddings_is_peft_merge(tmp_path: Path, options: dict[str, object]) -> None:
    assert_as_merged_by_peft(Case(tmp_path, qwen(tied=True), **options))


GROWN = {
    "linear": {"target_modules": LINEAR},
    "rows": {"target_modules": LINEAR, "trainable_token_indices": {"embed_tokens": [7, 45]}},
    "both saved": {"target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", GROWN.values(), ids=GROWN.keys())
def test_fold_of_a_grown_vocabulary_is_peft_merge(
    tmp_path: Path, options: dict[str, object], tied: bool
) -> None:
    bound = assert_as_merged_by_peft(Case(tmp_path, qwen(tied), vocab_size=46, **options))
    assert bound.config["vocab_size"] == 46


GPT2 = {
    "plain": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "flag left out": {"target_modules": ["c_attn", "c_proj", "c_fc"]},
    "flag of the head": {"target_modules": ["attn.c_proj", "lm_head"]},
    "dora": {"target_modules": ["c_attn", "attn.c_proj", "wte"], "use_dora": True},
    "bias": {"target_modules": ["c_attn"], "bias": "all"},
}


@pytest.mark.parametrize("options", GPT2.values(), ids=GPT2.keys())
def test_fold_of_gpt2_is_peft_merge(tmp_path: Path, options: dict[str, object]) -> None:
    tied = not {"wte", "lm_head"} & {*options["target_modules"]}
    case = Case(tmp_path, gpt2(tied), **options)
    assert_as_merged_by_peft(case)

    # the original checkpoints lack the prefix `transformer.` and the key for tied embeddings
    bare = {name.removeprefix("transformer."): a for name, a in case.base_tensors().items()}
    config = case.base_config()
    if tied:
        del config["tie_word_embeddings"]
    folded, _ = fold_all(case.adapter, bare, config)
    for name, expected in case.merged.items():
        assert_allclose(folded[name.removeprefix("transformer.")], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("use_dora", [False, True])
def test_half_precision_is_not_rounded(tmp_path: Path, dtype: torch.dtype, use_dora: bool) -> None:
    targets = ["q_proj", "down_proj", "embed_tokens"]
    case = Case(tmp_path, qwen(tied=False).to(dtype), target_modules=targets, use_dora=use_dora)
    folded, _ = fold_all(case.adapter, case.base_tensors(), case.base_config())
    reference = reference_fold(case)
    assert len(reference) == 5
    for name, expected in case.merged.items():
        if name not in reference:
            assert_array_equal(folded[name], expected)
            continue
        assert folded[name].dtype == np.float32
        float32_error = 4 * 2.0**-24 * np.abs(reference[name]).max()
        assert np.all(np.abs(folded[name] - reference[name]) <= float32_error)
        # peft rounds an embedding's update, and then the sum
        base = case.base_tensors()[name].astype(float)
        ulp = spacing(reference[name], expected.dtype)
        ulp += spacing(reference[name] - base, expected.dtype)
        assert np.all(np.abs(folded[name] - expected.astype(float)) <= ulp)


def spacing(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The distance of neighbours of `dtype` around normal `values`."""
    _, exponent = np.frexp(values)
    info = ml_dtypes.finfo(dtype)
    return np.ldexp(float(info.eps), np.maximum(exponent - 1, info.minexp))


def write_adapter(folder: Path, tensors: dict[str, np.ndarray], **options: object) -> Path:
    """An adapter of rank 2 and alpha 2 by hand; keys without the prefix that all share."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **options}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"base_model.model.{key}": array for key, array in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


BASE = {
    "model.embed_tokens.weight": np.ones((6, 4), np.float32),
    "model.layers.0.q_proj.weight": np.ones((4, 4), np.float32),
    "model.layers.0.up_proj.weight": np.ones((8, 4), np.float32),
    "model.layers.0.up_proj.bias": np.ones(8, np.float32),
    "model.layers.0.conv.weight": np.ones((4, 1, 3), np.float32),
    "model.layers.0.packed.weight": np.ones((4, 4), np.uint8),
    "lm_head.weight": np.ones((6, 4), np.float32),
}
A, B = np.ones((2, 4), np.float32), np.ones((8, 2), np.float32)
UP = "model.layers.0.up_proj"
FACTORS = {f"{UP}.lora_A.weight": A, f"{UP}.lora_B.weight": B}
HEAD = {"lm_head.lora_A.weight": A, "lm_head.lora_B.weight": B[:6]}
EMBED = "model.embed_tokens"


def bind(adapter: Path, **config: object) -> BoundAdapter:
    base = {name: array.copy() for name, array in BASE.items()}
    if config.pop("headless", False):
        del base["lm_head.weight"]
    return fold_all(adapter, base, {"tie_word_embeddings": False, **config})[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "LOHA"}, r"adapter_config.json: peft_type is 'LOHA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights = 'corda'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights = 'loftq'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights = 'lora_ga'"),
        ({"init_lora_weights": "of_tomorrow"}, "init_lora_weights = 'of_tomorrow'"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters = "),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication = "),
        ({"megatron_config": {"a": 1}}, "megatron_config = "),
        ({"kasa_config": {"beta": 0.1}}, "kasa_config = "),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens = "),
        ({"use_qalora": True}, "use_qalora = True"),
        ({"option_of_tomorrow": 1}, "option_of_tomorrow = 1"),
        ({"r": 0}, "r must be a positive integer, not 0"),
        ({"r": True}, "r must be a positive integer, not True"),
        ({"r": None}, "r must be a positive integer, not None"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number, not '16'"),
        ({"lora_alpha": None}, "lora_alpha must be a number, not None"),
        ({"use_dora": "yes"}, "use_dora must be true or false"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern must be"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern must be"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern must be"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be"),
        ({"trainable_token_indices": {"a": 3}}, "trainable_token_indices must be"),
    ],
    ids=str,
)
def test_refuses_config(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_adapter(write_adapter(tmp_path, FACTORS, **options))


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_accepts_what_leaves_the_base_alone(tmp_path: Path, init: object) -> None:
    unset = {"layer_replication": None, "option_of_tomorrow": None, "use_qalora": False}
    training = {"lora_dropout": 0.1, "target_modules": ["up_proj"], "eva_config": {"rho": 2.0}}
    folder = write_adapter(tmp_path, FACTORS, init_lora_weights=init, **unset, **training)
    assert bind(folder).touches(f"{UP}.weight")


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({f"{UP}.lora_A.weight": A}, {}, "up_proj has lora_A.weight, where .* lora_B.weight"),
        ({f"{UP}.lora_B.weight": B}, {}, "up_proj has lora_B.weight, where .* lora_A.weight"),
        (FACTORS, {"use_dora": True}, "calls for .*lora_magnitude_vector"),
        (FACTORS | {f"{UP}.lora_magnitude_vector": B[:, 0]}, {}, "has .*lora_magnitude_vector"),
        (FACTORS | {f"{UP}.lora_B.bias": B[:, 0]}, {}, "has .*lora_B.bias"),
        (FACTORS, {"lora_bias": True}, "calls for .*lora_B.bias"),
        (FACTORS, {"r": 3}, r"lora_A.weight has shape \(2, 4\), .* \(3, 4\)"),
        (FACTORS, {"rank_pattern": {"up_proj": 1}}, r"has shape \(2, 4\), .* \(1, 4\)"),
        (FACTORS, {"fan_in_fan_out": True}, r"has shape \(2, 4\), .* \(2, 8\)"),
        (FACTORS | {f"{UP}.lora_B.weight": B[1:]}, {}, r"has shape \(7, 2\), .* \(8, 2\)"),
        (
            FACTORS | {f"{UP}.lora_magnitude_vector": B[:, 0:1]},
            {"use_dora": True},
            r"lora_magnitude_vector has shape \(8, 1\), .* \(8,\)",
        ),
        (FACTORS | {f"{UP}.bias": B[1:, 0]}, {"bias": "all"}, r"shape \(7,\), .* \(8,\)"),
        ({"model.layers.0.z.lora_A.weight": A}, {}, r"lacks model.layers.0.z.weight \(0 of 1 fit"),
        (
            FACTORS | {f"model.layers.{i}.z.lora_A.weight": A for i in range(1, 6)},
            {},
            r"lacks model.layers.1.z.weight, .*3.z.weight, ... \(1 of 6 fit",
        ),
        (FACTORS | {f"{UP}.lora_diag": A}, {}, "the base lacks model.layers.0.up_proj.lora_diag"),
        (FACTORS | {"score.weight": A}, {"modules_to_save": ["score"]}, "base lacks score.weight"),
        (FACTORS | {"layers.0.up_proj.lora_A.weight": A}, {}, "are both model.layers.0.up_proj"),
        (
            FACTORS | {f"{UP}.bias": B[:, 0], f"{UP}.base_layer.bias": B[:, 0]},
            {},
            "are both model.layers.0.up_proj.bias",
        ),
        (
            {"model.layers.0.q_proj.lora_A.weight": A}
            | {"model.layers.0.q_proj.lora_B.weight": B[:4]}
            | {"model.layers.0.q_proj.lora_B.bias": B[:4, 0]},
            {"lora_bias": True},
            "base lacks model.layers.0.q_proj.bias",
        ),
        ({"model.layers.0.conv.lora_A.weight": A}, {}, "conv.weight, which is no matrix"),
        ({"model.layers.0.packed.lora_A.weight": A}, {}, "which the base holds as uint8"),
        ({f"{UP}.lora_A.weight": A.astype(np.int8)}, {}, "lora_A.weight is int8"),
        ({}, {}, "holds no tensors"),
        (
            {f"{EMBED}.weight": np.ones((7, 4), np.float32)},
            {},
            "different vocabularies, of 6 and 7",
        ),
        ({f"{EMBED}.weight": np.ones((7, 3), np.float32)}, {}, r"\(7, 3\), .* \(7, 4\)"),
        (
            {f"{EMBED}.token_adapter.trainable_tokens_delta": A},
            {"trainable_token_indices": [1, 2, 3]},
            r"shape \(2, 4\), .* \(3, 4\)",
        ),
        (
            {f"{EMBED}.token_adapter.trainable_tokens_delta": A},
            {"trainable_token_indices": [1, 6]},
            "name rows that model.embed_tokens.weight, .* does not have",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_tensors(
    tmp_path: Path, tensors: dict[str, np.ndarray], options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=f"^{tmp_path}.*{message}"):
        bind(write_adapter(tmp_path, tensors, **options))


@pytest.mark.parametrize(
    ("tensors", "options", "base", "message"),
    [
        (
            {f"{EMBED}.lora_embedding_A": np.eye(2, 6, dtype=np.float32)}
            | {f"{EMBED}.lora_embedding_B": np.eye(4, 2, dtype=np.float32)}
            | HEAD,
            {"ensure_weight_tying": True},
            {"headless": True},
            "embedding_A and .*lm_head.lora_B.weight are of one tied weight, but differ",
        ),
        (
            {f"{EMBED}.weight": B[:6, :1] * A[:1], "lm_head.weight": -B[:6, :1] * A[:1]},
            {},
            {"headless": True},
            "are one tied weight, but differ",
        ),
        (HEAD, {}, {"headless": True, "tie_word_embeddings": False}, "base lacks lm_head.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_unclear_ties(
    tmp_path: Path,
    tensors: dict[str, np.ndarray],
    options: dict[str, object],
    base: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        bind(write_adapter(tmp_path, tensors, **options), **{"tie_word_embeddings": True} | base)


def test_refuses_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*adapter_config.json"):
        read_adapter(tmp_path)
    folder = write_adapter(tmp_path, FACTORS)
    weights = folder / "adapter_model.safetensors"
    save_file({"up_proj.lora_A.weight": A}, weights)
    with pytest.raises(InputError, match=r"up_proj.lora_A.weight is no adapter tensor"):
        read_adapter(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model.bin is a pickle"):
        read_adapter(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match=r"cannot read .*adapter_model.safetensors"):
        read_adapter(folder)


def test_a_tensor_has_one_place_or_is_refused() -> None:
    base = [
        "weight",
        "model.layers.0.q.weight",
        "tower.layers.1.q.weight",
        "model.layers.1.q.weight",
    ]
    assert find_places(["layers.0.q.weight", "a.b.c.weight"], base, "here") == {
        "layers.0.q.weight": "model.layers.0.q.weight",
        "a.b.c.weight": None,
    }
    assert find_places(["x.model.layers.1.q.weight"], base, "here") == {
        "x.model.layers.1.q.weight": "model.layers.1.q.weight"
    }
    with pytest.raises(InputError, match=r"here: layers.1.q.weight could be tower.* or model"):
        find_places(["layers.1.q.weight"], base, "here")


def test_the_first_pattern_that_matches_a_whole_name_counts(tmp_path: Path) -> None:
    patterns = {"proj": 3, "q_proj": 4, r"layers\.1\..*": 5, "[qv]_proj": 6}
    folder = write_adapter(tmp_path, FACTORS, rank_pattern=patterns, alpha_pattern={"v_proj": 9})
    modules = ["layers.0.q_proj", "layers.1.q_proj", "layers.1.v_proj", "layers.0.v_proj", "o_proj"]
    config = read_lora_config(folder / "adapter_config.json").resolved(modules, folder)
    assert [config.rank(module) for module in modules] == [4, 4, 5, 6, 2]
    assert config.scale("layers.0.v_proj") == 1.5
    assert config.scale("o_proj") == 1.0


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("key", "pattern"),
    [
        ("rank_pattern", "([a-z_.0-9]+)*!"),
        ("alpha_pattern", "(..?|.)*!"),
    ],
)
def test_patterns_that_match_for_ever_are_refused(tmp_path: Path, key: str, pattern: str) -> None:
    module = "base_model.model.model.layers.0.self_attention.and_more.q_proj"
    factors = {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
    folder = write_adapter(tmp_path, factors, **{key: {"a": 3, pattern: 2}})
    with pytest.raises(InputError, match=rf"{key} cannot be matched: it takes more than 2 s"):
        read_adapter(folder)


@pytest.mark.parametrize("pattern", ["(" * 3000 + ")" * 3000, "a{9999999999}", "(?P<a", "[[a"])
def test_patterns_that_are_none_are_refused(tmp_path: Path, pattern: str) -> None:
    folder = write_adapter(tmp_path, FACTORS, rank_pattern={pattern: 2})
    with pytest.raises(InputError, match="rank_pattern must be patterns to ranks"):
        read_adapter(folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_an_untrained_adapter_leaves_every_dtype_alone(tmp_path: Path, dtype: str) -> None:
    base = np.random.default_rng(0).normal(size=(8, 4)).astype(np.dtype(dtype))
    folder = write_adapter(tmp_path, {f"{UP}.lora_A.weight": A, f"{UP}.lora_B.weight": 0 * B})
    folded, _ = fold_all(folder, {f"{UP}.weight": base}, {})
    assert_array_equal(folded[f"{UP}.weight"].astype(base.dtype), base)


def test_a_copy_keeps_what_the_dtype_of_the_base_would_round(tmp_path: Path) -> None:
    copy = np.random.default_rng(0).normal(size=8).astype(np.float32)
    folder = write_adapter(tmp_path, {f"{UP}.base_layer.bias": copy}, bias="lora_only")
    folded, bound = fold_all(folder, {f"{UP}.bias": np.zeros(8, ml_dtypes.bfloat16)}, {})
    assert bound.specs[f"{UP}.bias"].dtype == ml_dtypes.bfloat16
    assert_array_equal(folded[f"{UP}.bias"], copy)


DORA = {f"{UP}.lora_magnitude_vector": np.ones(8, np.float32)}
LARGE = {"scaled": np.full((8, 2), 1e30, np.float32), "added": np.full((8, 2), 3e38, np.float32)}


@pytest.mark.parametrize(
    ("tensors", "base", "options"),
    [
        (FACTORS | {f"{UP}.lora_A.weight": A * np.nan}, 1, {}),
        (FACTORS | {f"{UP}.lora_B.weight": B * np.inf}, 1, {}),
        (FACTORS | {f"{UP}.lora_B.weight": LARGE["scaled"]}, 1, {"lora_alpha": 1e10}),
        (FACTORS | {f"{UP}.lora_B.weight": LARGE["added"]}, 1, {}),
        (FACTORS | {f"{UP}.lora_B.weight": np.full((8, 2), 1e300)}, 1, {}),
        (FACTORS | {f"{UP}.lora_B.weight": 0 * B} | DORA, 0, {"use_dora": True}),
        ({f"{UP}.weight": B @ A * np.nan}, 1, {"modules_to_save": ["up_proj"]}),
    ],
    ids=["A", "B", "scale", "sum", "float64", "dora of zero", "copy"],
)
def test_a_fold_that_is_not_finite_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, np.ndarray], base: float, options: dict[str, object]
) -> None:
    folder = write_adapter(tmp_path, tensors, **options)
    weight = {f"{UP}.weight": np.full((8, 4), base, np.float32)}
    finite = all(np.isfinite(array).all() for array in tensors.values())
    why = "overflows float32, or DoRA" if finite else "holds NaN or infinite values"
    match = f"{folder}/adapter_model.*: tensor {UP}.weight is not finite .* as .*{why}"
    with pytest.raises(InputError, match=match):
        fold_all(folder, weight, {})


def test_what_a_wider_base_holds_is_folded_in_it(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, FACTORS | {f"{UP}.lora_B.weight": np.full((8, 2), 1e300)})
    folded, _ = fold_all(folder, {f"{UP}.weight": np.full((8, 4), 1.0)}, {})
    assert_allclose(folded[f"{UP}.weight"], np.full((8, 4), 2e300))


def test_a_sum_too_large_for_its_base_s_dtype_is_folded_all_the_same(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, FACTORS | {f"{UP}.lora_B.weight": B * 50_000})
    folded, _ = fold_all(folder, {f"{UP}.weight": np.full((8, 4), 1, np.float16)}, {})
    assert_array_equal(folded[f"{UP}.weight"], np.full((8, 4), 100_001, np.float32))


def test_what_the_base_has_of_nan_is_not_the_adapter_s(tmp_path: Path) -> None:
    folded, _ = fold_all(
        write_adapter(tmp_path, FACTORS), {f"{UP}.weight": np.full((8, 4), np.nan, np.float32)}, {}
    )
    assert np.isnan(folded[f"{UP}.weight"]).all()


@st.composite
def matrices(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """W (out, in), A (r, in) and B (out, r), of small whole numbers so that sums are exact."""
    outputs, inputs, rank = (draw(st.integers(1, 5)) for _ in range(3))
    shapes = {"w": (outputs, inputs), "a": (rank, inputs), "b": (outputs, rank)}
    whole = st.integers(-8, 8)
    return {
        key: draw(hnp.arrays("float32", shape, elements=whole)) for key, shape in shapes.items()
    }


def low_rank(
    parts: dict[str, np.ndarray], scale: float, magnitude: np.ndarray | None = None
) -> np.ndarray:
    """The update in both layouts, which must agree."""
    read = (parts | {"m": magnitude}).__getitem__
    key = None if magnitude is None else "m"
    straight = LowRank("a", "b", key, scale, transposed=False)(parts["w"], read)
    transposed = LowRank("a", "b", key, scale, transposed=True)(parts["w"].T, read)
    assert_array_max_ulp(straight, transposed.T, 4)
    return straight


@given(
    hnp.arrays("float32", (3, 4), elements=st.floats(-(2.0**99), 2.0**99, width=32)),
    hnp.arrays("float32", (2, 4), elements=st.floats(-10, 10, width=32)),
    st.floats(-100, 100),
)
def test_without_b_the_base_stays_bit_for_bit(w: np.ndarray, a: np.ndarray, scale: float) -> None:
    assert_array_equal(low_rank({"w": w, "a": a, "b": np.zeros((3, 2), "f")}, scale), w)


@given(matrices(), st.integers(-8, 8))
def test_update_is_scale_times_b_a(parts: dict[str, np.ndarray], scale: int) -> None:
    expected = parts["w"] + scale * np.einsum("or,ri->oi", parts["b"], parts["a"])
    assert_array_equal(low_rank(parts, scale), expected)


@given(matrices(), st.data())
def test_dora_sets_the_norm_of_each_output(
    parts: dict[str, np.ndarray], data: st.DataObject
) -> None:
    plain = low_rank(parts, 0.5)
    norms = np.linalg.norm(plain, axis=1)
    parts["w"] = parts["w"] + np.where(norms == 0, 1, 0)[:, None].astype("f")
    magnitude = data.draw(hnp.arrays("float32", len(norms), elements=st.integers(1, 9)))
    plain, scaled = low_rank(parts, 0.5), low_rank(parts, 0.5, magnitude)
    assert_allclose(np.linalg.norm(scaled, axis=1), magnitude, rtol=1e-6)
    own = np.linalg.norm(plain, axis=1)
    assert_allclose(low_rank(parts, 0.5, own), plain, rtol=1e-6)
