"""Draw samples without data: generate them with a model, or draw random tokens."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from recall_jax.checkpoint.class_defaults import attribute
from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.engine.device import find_not_finite
from recall_jax.errors import InputError
from recall_jax.generation.end_of_text import end_of_text, start_of_text
from recall_jax.generation.generate import check_token_ids, generate
from recall_jax.generation.prompt_tokens import encode_prompt
from recall_jax.inputs.row_files import Row, iterate_rows
from recall_jax.inputs.samples import INPUT_IDS, Tokenized
from recall_jax.inputs.settings import Samples
from recall_jax.inputs.shapes import Chat, Pair, row_content
from recall_jax.inputs.tokens import UNLIMITED, Tokenizer, most_characters
from recall_jax.models.architecture import Architecture
from recall_jax.models.convert import tensor_shapes, to_flax


def draw_samples(
    settings: Samples, model: Checkpoint, arch: Architecture, tokenizer: Tokenizer, place: int = 0
) -> Tokenized:
    """Return `settings.count` sequences drawn from a model, reproducible from the seed and `place`.

    `settings.source` is "generated": ancestral sampling at temperature 1 from the start of a text,
    or as the answer to each prompt, until the model ends the text or `max_tokens` is reached, with
    the full model in memory. Otherwise it is "random": a start of text, then tokens drawn uniformly
    from the vocabulary without special tokens. No sequence is longer than the model's maximum.

    Raises InputError if the prompts cannot be read or leave no room for an answer, and if a
    parameter of the model is not finite.
    """
    longest = attribute(model.config, "max_position_embeddings") or settings.max_tokens
    max_tokens = min(settings.max_tokens, longest)
    seed = int(np.random.SeedSequence([settings.seed, place]).generate_state(1)[0])
    if settings.source == "random":
        start = start_of_text(model, tokenizer)
        prompts = [start] * settings.count
        texts = [""] * settings.count
        answers = _random_tokens(
            settings.count, max(max_tokens - len(start), 1), arch.vocab_size, tokenizer, seed
        )
    else:
        texts, prompts = _prompts(settings, model, tokenizer, max_tokens)
        room = max_tokens - max(map(len, prompts))
        if room < 1:
            raise InputError(
                f"{settings.prompts or model.name}: a prompt of {max_tokens} tokens or more "
                f"leaves no room for an answer within {max_tokens}: allow more with "
                "samples.max_tokens, or shorten it"
            )
        check_token_ids(arch, prompts, f"{settings.prompts or model.name}: prompt")
        tensors = {name: model.read(name) for name in tensor_shapes(arch)}
        if fault := find_not_finite(model.name, tensors):
            raise InputError(fault)
        answers = generate(
            arch,
            to_flax(arch, tensors),
            prompts,
            max_new_tokens=room,
            eos_token_ids=end_of_text(model),
            batch_size=min(settings.batch_size, settings.count),
            temperature=1.0,
            seed=seed,
        )
    token_ids = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    rows = [
        _row(text, answer, ids, tokenizer)
        for text, answer, ids in zip(texts, answers, token_ids, strict=True)
    ]
    return Tokenized(
        np.arange(settings.count),
        tuple(rows),
        tuple(text + tokenizer.decode(ids) for text, ids in zip(texts, answers, strict=True)),
        tuple(token_ids),
    )


def _prompts(
    settings: Samples, model: Checkpoint, tokenizer: Tokenizer, max_tokens: int
) -> tuple[list[str], list[list[int]]]:
    """Return the text and the tokens of `count` prompts, from the file in turn, or starts of text.

    A text far longer than `max_tokens` is truncated before it is tokenised.
    """
    most = most_characters(max_tokens)
    if settings.prompts is None:
        return [""] * settings.count, [start_of_text(model, tokenizer)] * settings.count
    path = Path(settings.prompts)
    texts, prompts = [], []
    for index, row in enumerate(islice(iterate_rows(path), settings.count)):
        empty: Any = [] if isinstance(row.get("prompt"), list) else ""
        content = row_content({"completion": empty, **row}, f"{path}, row {index} (from 0)")
        if isinstance(content, Chat):
            messages = content.messages[: content.given or None]
            text = tokenizer.chat_text(messages, add_generation_prompt=True)
            tokens = tokenizer.encode(text[:most], UNLIMITED, False)
        else:
            text = content.prompt if isinstance(content, Pair) else content
            tokens = encode_prompt(tokenizer, text[:most])
        texts.append(text)
        prompts.append(tokens)
    places = [index % len(texts) for index in range(settings.count)]
    return [texts[place] for place in places], [prompts[place] for place in places]


def _random_tokens(
    count: int, length: int, vocab_size: int, tokenizer: Tokenizer, seed: int
) -> list[list[int]]:
    """Return token ids (count, length), uniform over those that the tokenizer decodes to text."""
    rng = np.random.default_rng(seed)
    tokens: list[int] = []
    is_text: dict[int, bool] = {}
    for _ in range(1000):
        if len(tokens) >= count * length:
            break
        for token in rng.integers(vocab_size, size=count * length).tolist():
            if token not in is_text:
                is_text[token] = tokenizer.decode([token]) != ""
            if is_text[token]:
                tokens.append(token)
    else:
        raise InputError("the tokenizer has no tokens of text: use the one that fits the model")
    return [tokens[start : start + length] for start in range(0, count * length, length)]


def _row(prompt: str, answer: Sequence[int], ids: list[int], tokenizer: Tokenizer) -> Row:
    """Return a drawn row in the form of a data file, with its tokens if its text gives others."""
    text = tokenizer.decode(answer)
    row: Row = {"prompt": prompt, "completion": text} if prompt else {"text": text}
    again = tokenizer.encode(prompt + text, UNLIMITED, True)
    return row if again == ids else {**row, INPUT_IDS: ids}
