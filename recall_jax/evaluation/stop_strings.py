"""Strings at which an answer ends, looked for in its text."""

from collections.abc import Callable, Sequence

from recall_jax.inputs.tokens import Tokenizer


def stops_at(tokenizer: Tokenizer, strings: Sequence[str]) -> Callable[[list[int]], bool] | None:
    """The `stop` of `generate`: whether the text of new tokens holds any of these strings."""
    if not strings:
        return None

    def stop(token_ids: list[int]) -> bool:
        text = tokenizer.decode(token_ids)
        return any(string in text for string in strings)

    return stop


def before_any(text: str, strings: Sequence[str]) -> str:
    """The text up to the first place at which any of the strings begins."""
    return text[: min((text.index(string) for string in strings if string in text), default=None)]
