"""Mark the tokens to predict in labelled examples."""

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.errors import InputError
from recall_jax.generation.end_of_text import end_of_text
from recall_jax.inputs.parts import row_parts, tokenize_parts
from recall_jax.inputs.samples import Tokenized
from recall_jax.inputs.settings import Samples
from recall_jax.inputs.tokens import Tokenizer


def label_tokens(
    samples: Tokenized, settings: Samples, model: Checkpoint, tokenizer: Tokenizer
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the token ids of each row, and a mask of its predicted tokens: label and end of text.

    Raises InputError for a row without a label within `max_tokens`.
    """
    end = end_of_text(model)[0]
    token_ids, counted = [], []
    for index, row in zip(samples.indices, samples.rows, strict=True):
        where = f"{settings.data or settings.typical}, row {index} (from 0)"
        parts = row_parts(row, where, tokenizer, settings.fields)
        ids, counts = tokenize_parts(parts, tokenizer, where, end, settings.max_tokens)
        token_ids.append(ids)
        counted.append(counts)
        if not any(counted[-1][1:]):
            raise InputError(
                f"{where} has no token to predict within {settings.max_tokens} tokens: remove it, "
                "or allow more with samples.max_tokens"
            )
    return token_ids, counted
