"""Whether prompts and answers are longer than the texts that a model was made for."""

from collections.abc import Sequence

from recall_jax.evaluation.examples import Example
from recall_jax.evaluation.resident import Resident
from recall_jax.evaluation.task import Generation, Perplexity, Task
from recall_jax.generation.prompt_tokens import encode_prompt


def count_too_long(task: Task, examples: Sequence[Example], model: Resident) -> int:
    """How many examples take more than the model's `max_length` tokens, answers included.

    Texts whose perplexity is asked are cut to fit, and never too long. Takes no weights.
    """
    if isinstance(task.scoring, Perplexity):
        return 0
    new = task.scoring.max_new_tokens if isinstance(task.scoring, Generation) else 0

    def length(example: Example) -> int:
        choice = "" if new else max(example.choices, key=len)
        return len(encode_prompt(model.tokenizer, example.prompt + choice)) + new

    # The last token is not fed.
    return sum(length(example) - 1 > model.max_length for example in examples)
