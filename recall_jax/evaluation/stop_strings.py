"""Stop generation at strings in the generated text."""

from collections.abc import Callable, Sequence

from recall_jax.inputs.tokens import Tokenizer


def stops_at(tokenizer: Tokenizer, strings: Sequence[str]) -> Callable[[list[int]], bool] | None:
    """Return a `stop` for `generate`, which is whether the new text contains any of `strings`.

    Returns None if there are no strings.
    """
    if not strings:
        return None

    def stop(token_ids: list[int]) -> bool:
        text = tokenizer.decode(token_ids)
        return any(string in text for string in strings)

    return stop


def before_any(text: str, strings: Sequence[str]) -> str:
    """Return the text up to where the first of the strings begins, all of it if there is none."""
    return text[: min((text.index(string) for string in strings if string in text), default=None)]
