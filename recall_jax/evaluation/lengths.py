"""Check whether prompts and answers fit a model's maximum length and the memory."""

from collections.abc import Sequence

from recall_jax.engine.budget import MIB, memory_budget, room_for_rows
from recall_jax.engine.memory import working_bytes
from recall_jax.errors import InputError
from recall_jax.evaluation.examples import Example
from recall_jax.evaluation.resident import ResidentModel
from recall_jax.evaluation.task import Generation, Perplexity, Task
from recall_jax.generation.prompt_tokens import encode_prompt
from recall_jax.inputs.batches import padded_length

_TOKENISING = 200  # bytes of memory for each character of a text


def count_too_long(task: Task, examples: Sequence[Example], model: ResidentModel) -> int:
    """Return how many examples take more than the model's `max_length` tokens, with their answers.

    A text whose perplexity is measured is split into windows, and never too long. The model needs
    no weights.
    """
    if isinstance(task.scoring, Perplexity):
        return 0
    return sum(_tokens(task, example, model) > model.max_length for example in examples)


def check_memory(
    task: Task, examples: Sequence[Example], model: ResidentModel, batch_size: int
) -> None:
    """Raise InputError for a prompt that is too long to tokenise or to run in free memory."""
    budget = memory_budget(None)
    room = room_for_rows(budget)
    for example in examples:
        where, text = f"{task.task}, row {example.row} (from 0)", _longest(example)
        if len(text) * _TOKENISING > room:
            raise InputError(
                f"{where}: a prompt of {len(text):,} characters is too long for the memory that is "
                "free: shorten it or leave it out"
            )
        if len(text) <= model.max_length or isinstance(task.scoring, Perplexity):
            continue
        tokens = _tokens(task, example, model)
        needed = working_bytes(model.arch, batch_size, padded_length(tokens), 1)
        if tokens > model.max_length and needed > budget:
            raise InputError(
                f"{where} takes {tokens:,} tokens with its answer, the model was made for "
                f"{model.max_length:,}, and a batch of {batch_size} such rows takes "
                f"{needed / MIB:,.0f} MiB of memory: shorten it, leave it out, or lower "
                "evaluate.batch_size"
            )


def _longest(example: Example) -> str:
    return example.prompt + max(example.choices, key=len, default="")


def _tokens(task: Task, example: Example, model: ResidentModel) -> int:
    """Return the number of tokens fed: prompt and answer, without the answer's last token."""
    new = task.scoring.max_new_tokens if isinstance(task.scoring, Generation) else 0
    text = example.prompt if new else _longest(example)
    return len(encode_prompt(model.tokenizer, text)) + new - 1
