"""Define the suite of string tasks: the demo's five, and two with answers in brackets.

The base is trained on strings of 4 to 6 letters, and fine-tunes on 4 to 8, the lengths evaluated;
so the base knows every task in part, and a fine-tune learns one and forgets some of the others. The
learning rate of fine-tunes is the lowest of those tried (2e-4, 3e-4, 5e-4) at which all of them are
far better than the base on their task.
"""

from collections.abc import Sequence
from itertools import islice

from recall_jax.evaluation.strings import TASKS, StringRow, draw_distinct, draw_exercises
from recall_jax.experiments.suites.suite import Stage, Suite

BASE_LENGTHS = range(4, 7)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def strings_suite(seed: int = 0) -> Suite:
    """Return the suite of a seed."""
    return Suite(
        name="strings",
        tasks=tuple(TASKS),
        seed=seed,
        sizes=SIZES,
        words=tuple(f"{task} " for task in TASKS),
        base=Stage(rows=64_000, epochs=1, batch_size=32, learning_rate=3e-3),
        fine_tune=Stage(rows=2048, epochs=6, batch_size=16, learning_rate=5e-4),
        draw_base=_mixed,
        draw=draw_distinct,
    )


def _mixed(tasks: Sequence[str], count: int, seed: int) -> list[StringRow]:
    return list(islice(draw_exercises(tasks, seed, lengths=BASE_LENGTHS), count))
