"""Encode the prompts that a model continues."""

from recall_jax.inputs.tokens import UNLIMITED, Tokenizer


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of a text, with the special tokens that the tokenizer puts before it.

    Those that it puts after it, which would end the text, are left out.
    """
    token_ids = tokenizer.encode(text, UNLIMITED, True)
    return token_ids[: len(token_ids) - _num_special_after(tokenizer)]


def _num_special_after(tokenizer: Tokenizer) -> int:
    """Return how many special tokens the tokenizer puts after a text."""
    full, bare = (tokenizer.encode("a", UNLIMITED, special) for special in (True, False))
    starts = range(len(full) - len(bare) + 1)
    matches = [start for start in starts if bare and full[start : start + len(bare)] == bare]
    return len(full) - len(bare) - matches[0] if matches else 0
