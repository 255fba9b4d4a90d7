"""Tiny models as transformers and peft save them, and the command line run in this process.

Test folders that need them import the fixtures into their conftest.
"""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest
from haste import HASTE, in_haste

from recall_jax.files.interruption import STOPPING

# what differs from run to run: timings, and the files that show them
TIMED = {"recall_report.json", "recall_report.html", "README.md", "checksums.json"}

LAYERS = 3
UNITS = ("embed", "layers.0", "layers.1", "layers.2", "head")
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}


@dataclass(frozen=True)
class Toys:
    """Folders and files; read them, never write into them. The last of some models is the newest.

    qwen2: three untied bfloat16 models. llama: two tied float32 models, sharded; adapter: a LoRA of
    the first of them. data: 40 rows with the field text.
    """

    folder: Path

    @property
    def qwen2(self) -> list[str]:
        return [str(self.folder / "qwen2" / str(k)) for k in range(3)]

    @property
    def llama(self) -> list[str]:
        return [str(self.folder / "llama" / str(k)) for k in range(2)]

    @property
    def adapter(self) -> str:
        return str(self.folder / "llama" / "adapter")

    @property
    def data(self) -> str:
        return str(self.folder / "data.jsonl")


@functools.cache
def make_toys(folder: Path) -> Toys:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(1)  # for models this small, more threads take ten times as long
    torch.manual_seed(0)
    qwen2 = Qwen2Config(**SIZES, tie_word_embeddings=False)
    llama = LlamaConfig(**SIZES, tie_word_embeddings=True)
    save_relatives(Qwen2ForCausalLM, qwen2, torch.bfloat16, folder / "qwen2", 3, "1GB")
    save_relatives(LlamaForCausalLM, llama, torch.float32, folder / "llama", 2, "40KB")
    _save_adapter(folder / "llama" / "0", folder / "llama" / "adapter")
    rows = random.Random(0)
    with (folder / "data.jsonl").open("w") as file:
        for _ in range(40):
            text = "".join(rows.choices("abcdefgh XYZ01", k=rows.randint(3, 28)))
            file.write(json.dumps({"text": text}) + "\n")
    return Toys(folder)


def save_relatives(
    kind: Any, config: Any, dtype: Any, folder: Path, count: int, shard_size: str
) -> None:
    """A model, and others that are farther and farther from it."""
    import torch

    base = kind(config)
    tokenizer = make_tokenizer()
    for k in range(count):
        model = kind(config)
        model.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * k * torch.randn_like(parameter)
        model.to(dtype).save_pretrained(folder / str(k), max_shard_size=shard_size)
        tokenizer.save_pretrained(folder / str(k))


def _save_adapter(base: Path, folder: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft's own affairs
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder)


def make_tokenizer() -> Any:
    """One token for each printable ASCII character."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<pad>", "<eos>", *map(chr, range(32, 127))]
    vocabulary = {character: index for index, character in enumerate(characters)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<pad>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<pad>"
    )


@pytest.fixture(scope="session")
def toys(tmp_path_factory) -> Toys:
    return make_toys(tmp_path_factory.getbasetemp() / "toys")


@pytest.fixture(scope="session")
def cache() -> Path:
    """Home of compiled programs, shared by the workers of a run and the processes they start."""
    return Path(os.environ["XDG_CACHE_HOME"])


@dataclass(frozen=True)
class Finished:
    """What a command left: exit status, stdout, stderr."""

    status: int
    out: str
    err: str


Recall = Callable[..., Finished]


@pytest.fixture
def recall(capfd, monkeypatch) -> Recall:
    """Run a command line of `recall` in this process."""
    from recall_jax.cli.main import main

    def run(*arguments: Any) -> Finished:
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["recall", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(words)
        out, err = capfd.readouterr()
        assert isinstance(exit_.value.code, int)
        return Finished(exit_.value.code, out, err)

    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    before = {name: getattr(jax.config, name) for name in _JAX_OPTIONS}
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name, value in before.items():
        jax.config.update(name, value)


_JAX_OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


def environment(cache: Path, devices: int = 1) -> dict[str, str]:
    """For processes as a user starts them, with `devices` each; they share compiled programs.

    They compile in haste where this process does.
    """
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))
    }
    flags = [] if devices == 1 else [f"--xla_force_host_platform_device_count={devices}"]
    if in_haste():
        flags += [f"--{name}={value}".lower() for name, value in HASTE.items()]
        kept |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    kept |= {"XLA_FLAGS": " ".join(flags)} if flags else {}
    return kept | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache)}


def copy_model(source: str | Path, target: Path, **config: Any) -> Path:
    """A model folder to be damaged: a copy, with changed attributes of its config (None: none)."""
    shutil.copytree(source, target)
    path = target / "config.json"
    values = json.loads(path.read_text()) | config
    kept = {name: value for name, value in values.items() if value is not None}
    path.write_text(json.dumps(kept))
    return target


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, hidden ones included, with the bytes of the files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def write_rows(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Mount a file system of memory with these options, or change them; where it is."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        if os.path.ismount(place):
            options = f"remount,{options}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "recall", place])
        assert done.returncode == 0
        return place

    probe = ["mount", "-t", "tmpfs", "recall", str(place)]
    if sys.platform != "linux" or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("only root of a Linux may mount a small file system")
    subprocess.run(["umount", place], check=True)
    yield mount
    subprocess.run(["umount", place], check=True)
