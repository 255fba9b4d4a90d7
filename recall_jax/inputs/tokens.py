"""Tokenise texts with the reference model's tokenizer and its special tokens.

The `tokenizers` library reads a tokenizer.json if it is known to give the same ids as transformers;
all other tokenizers use transformers' AutoTokenizer, which takes seconds to import.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from recall_jax.checkpoint.companions import has_tokenizer
from recall_jax.errors import InputError, brief, reading
from recall_jax.files.json_objects import read_json_object
from recall_jax.foreign.process import ForeignError, run_limited
from recall_jax.inputs.panics import silenced_panics


@dataclass(frozen=True)
class _Pipeline:
    """Describe the tokenizer that a class of transformers builds, whatever tokenizer.json says.

    `model` has the options that are set; `tokens` are added if the file lacks them.
    """

    normalizer: Any
    pre_tokenizers: Sequence[Any]  # alternatives that differ in offsets, not in ids
    model: Mapping[str, Any]
    add_prefix_space: bool
    tokens: frozenset[str]


# transformers/models/qwen2/tokenization_qwen2.py
QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _Pipeline(
    normalizer={"type": "NFC"},
    pre_tokenizers=[
        {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": QWEN2_PIECES},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": trim_offsets,
                    "use_regex": False,
                },
            ],
        }
        for trim_offsets in (False, True)
    ],
    model={"type": "BPE"},
    add_prefix_space=False,
    tokens=frozenset({"<|endoftext|>"}),
)
# transformers/models/llama/tokenization_llama.py
_LLAMA = _Pipeline(
    normalizer=None,
    pre_tokenizers=[
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    ],
    model={"type": "BPE", "fuse_unk": True, "byte_fallback": True},
    add_prefix_space=True,
    tokens=frozenset({"<unk>", "<s>", "</s>"}),
)

# By model type and the class that tokenizer_config.json names: the pipeline that transformers
# builds, or None if it takes that of tokenizer.json. For qwen2 it always ignores the class.
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
_LLAMA_NAMES = ("LlamaTokenizer", "LlamaTokenizerFast")
_QWEN2_NAMES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
_LIGHT: dict[str, dict[str, _Pipeline | None]] = {
    "llama": dict.fromkeys(_GENERIC) | dict.fromkeys(_LLAMA_NAMES, _LLAMA),
    "mistral": dict.fromkeys(_GENERIC + _LLAMA_NAMES),
    "qwen2": dict.fromkeys(_GENERIC + _QWEN2_NAMES, _QWEN2),
    "qwen3": dict.fromkeys(_GENERIC) | dict.fromkeys(_QWEN2_NAMES, _QWEN2),
}
# If any of these is set, transformers deviates from tokenizer.json, or reads another file.
_CHANGES = (
    "add_bos_token",
    "add_eos_token",
    "split_special_tokens",
    "fix_mistral_regex",
    "fast_tokenizer_files",
    "auto_map",
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # encloses the assistant's text
_MISTRAL_FILE = "tekken.json"  # transformers prefers this file if mistral-common is installed


# As `max_tokens`: no truncation. The largest value that a tokenizer accepts.
UNLIMITED = 2**31 - 1
# A token has fewer characters than this, except in runs of white space, for which a text has a
# margin: characters beyond both cannot affect its tokens. Tokenising takes 200 bytes a character.
_MOST_OF_A_TOKEN, _MARGIN = 128, 1 << 16


class Tokenizer(Protocol):
    """Define what the samples need of a tokenizer."""

    def encode(self, text: str, max_tokens: int, special_tokens: bool) -> list[int]:
        """Return at most `max_tokens` token ids of `text`, with special tokens if requested."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""

    def chat_text(self, messages: list[Any], add_generation_prompt: bool = False) -> str:
        """Render messages as one text by the chat template; InputError if there is none.

        With `add_generation_prompt`, the beginning of the assistant's next turn follows.
        """

    def marked_answers(self, messages: list[Any]) -> list[tuple[int, int]] | None:
        """Return the parts of `chat_text` that the template marks as the assistant's.

        Each is (start, end) in characters. Returns None if the template has no `{% generation %}`.
        """


def most_characters(max_tokens: int) -> int:
    """Return how many characters of a text can affect its first `max_tokens` tokens."""
    return _MARGIN + _MOST_OF_A_TOKEN * max_tokens


def load_tokenizer(
    folders: Sequence[Path], model_type: str, others: Sequence[Path] = ()
) -> Tokenizer:
    """Load the tokenizer of the first folder that has one, as transformers does, or InputError.

    The folders in `others` are tried last, if the model's have none.
    """
    for folder in (*folders, *others):
        if has_tokenizer(folder):
            with _reading_of(folder):
                return _light_tokenizer(folder, model_type) or _AutoTokenizer(folder)
    raise InputError(
        f"{folders[-1]} has no tokenizer: put tokenizer.json and tokenizer_config.json beside its "
        "weights"
    )


@contextmanager
def _reading_of(folder: Path) -> Iterator[None]:
    """Report whatever the libraries raise for a folder's files, which may be wrong in any way."""
    with reading(f"the tokenizer of {folder}"), silenced_panics():
        yield


def _light_tokenizer(folder: Path, model_type: str) -> Tokenizer | None:
    """Load only tokenizer.json, or return None if transformers would deviate from it."""
    config = _read_object(folder / "tokenizer_config.json")
    classes, named = _LIGHT.get(model_type, {}), str(config.get("tokenizer_class"))
    if (
        named not in classes
        or not (folder / "tokenizer.json").is_file()
        or (folder / _MISTRAL_FILE).is_file()
        or any(config.get(key) for key in _CHANGES)
    ):
        return None
    tokenizer, pipeline = _LightTokenizer(folder, config), classes[named]
    needed = _special_tokens(folder, config) | (pipeline.tokens if pipeline else set())
    if tokenizer.added_tokens >= needed and (not pipeline or _is_built(pipeline, folder, config)):
        return tokenizer
    return None


def _is_built(pipeline: _Pipeline, folder: Path, config: Mapping[str, Any]) -> bool:
    """Return whether tokenizer.json describes the tokenizer that transformers would build."""
    content = read_json_object(folder / "tokenizer.json")
    options = {
        key: value
        for key, value in content["model"].items()
        if value and key not in ("vocab", "merges")
    }
    tokens = {str(token.pop("id")): token for token in content.get("added_tokens", ())}
    if "added_tokens_decoder" in config:
        same_tokens = config["added_tokens_decoder"] == tokens
    else:
        same_tokens = not (folder / "added_tokens.json").exists()
    return (
        content.get("normalizer") == pipeline.normalizer
        and content.get("pre_tokenizer") in pipeline.pre_tokenizers
        and options == pipeline.model
        and config.get("add_prefix_space") in (None, pipeline.add_prefix_space)
        and not config.get("legacy")
        and same_tokens
        and sorted(tokens, key=int) == list(tokens)  # ids are assigned in this order
    )


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> set[str]:
    """Return the tokens that transformers adds to tokenizer.json if it lacks them."""
    kinds = ("_token", "_special_tokens", "added_tokens_decoder")
    named = [value for key, value in config.items() if key.endswith(kinds)]
    named += _read_object(folder / "special_tokens_map.json").values()
    return set(_contents(named)) | set(_read_object(folder / "added_tokens.json"))


def _contents(tokens: Any) -> Iterator[str]:
    """Yield the texts of nested tokens, each a string or an object with `content`."""
    if isinstance(tokens, str):
        yield tokens
    elif isinstance(tokens, dict) and "content" in tokens:
        yield tokens["content"]
    elif isinstance(tokens, list | dict):
        for token in tokens if isinstance(tokens, list) else tokens.values():
            yield from _contents(token)


def _part(text: str, max_tokens: int, truncation_side: str) -> str:
    """Truncate a text to what can affect its first tokens, or its last if truncated on the left."""
    most = most_characters(max_tokens)
    return text[-most:] if truncation_side == "left" else text[:most]


class _AutoTokenizer:
    """Tokenise with transformers."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self._folder = folder
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # a malformed file can raise anything
            raise InputError(f"cannot load the tokenizer of {folder}: {brief(error)}") from error

    def encode(self, text: str, max_tokens: int, special_tokens: bool) -> list[int]:
        text = _part(text, max_tokens, self._tokenizer.truncation_side)
        most = min(max_tokens, UNLIMITED)
        with _reading_of(self._folder):
            return list(
                self._tokenizer(
                    text, add_special_tokens=special_tokens, truncation=True, max_length=most
                )["input_ids"]
            )

    def decode(self, token_ids: Sequence[int]) -> str:
        # The clean-up drops spaces in BPE tokens: transformers itself skips it for them.
        with _reading_of(self._folder):
            return str(
                self._tokenizer.decode(
                    token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
            )

    def chat_text(self, messages: list[Any], add_generation_prompt: bool = False) -> str:
        if not self._tokenizer.chat_template:
            raise InputError(f"the tokenizer of {self._folder} has no chat template")
        return str(self._by_template("chat", messages=messages, prompt=add_generation_prompt))

    def marked_answers(self, messages: list[Any]) -> list[tuple[int, int]] | None:
        if not _GENERATION.search(self._tokenizer.get_chat_template()):
            return None
        given = [
            {key: value for key, value in each.items() if value is not None} for each in messages
        ]
        return [(start, end) for start, end in self._by_template("marked", messages=given)]

    def _by_template(self, call: str, **arguments: Any) -> Any:
        """Call the chat template with messages, in the process for code from others."""
        tokenizer = self._tokenizer
        try:
            template, tokens = tokenizer.get_chat_template(), tokenizer.special_tokens_map
            return run_limited(call, template=template, tokens=tokens, **arguments)
        # several templates without a default, or unexpected messages
        except (ValueError, ForeignError) as error:
            message = f"the chat template of {self._folder} failed: {brief(error)}"
            raise InputError(message) from error


class _LightTokenizer:
    """Tokenise with `tokenizers`; transformers is loaded only for a chat template."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import tokenizers

        self._folder = folder
        path = folder / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception for a file it cannot read
            raise InputError(f"cannot read {path}: {brief(error)}") from error
        self._tokenizer.no_padding()
        saved = self._tokenizer.truncation or {}
        self._truncation_side = config.get("truncation_side", saved.get("direction", "right"))

    @property
    def added_tokens(self) -> set[str]:
        return {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}

    def encode(self, text: str, max_tokens: int, special_tokens: bool) -> list[int]:
        text = _part(text, max_tokens, self._truncation_side)
        with _reading_of(self._folder):
            most = min(max_tokens, UNLIMITED)
            self._tokenizer.enable_truncation(most, direction=self._truncation_side)
            return list(self._tokenizer.encode(text, add_special_tokens=special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        with _reading_of(self._folder):
            return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def chat_text(self, messages: list[Any], add_generation_prompt: bool = False) -> str:
        return self._with_template.chat_text(messages, add_generation_prompt)

    def marked_answers(self, messages: list[Any]) -> list[tuple[int, int]] | None:
        return self._with_template.marked_answers(messages)

    @cached_property
    def _with_template(self) -> _AutoTokenizer:
        return _AutoTokenizer(self._folder)


def _read_object(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}
