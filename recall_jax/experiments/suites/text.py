"""Define the suite of text: domains of Python's standard library, each to be predicted."""

from collections.abc import Sequence

from recall_jax.evaluation.library_text import DOMAINS, Passage, draw_passages, provenance
from recall_jax.experiments.suites.suite import Stage, Suite

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def text_suite(seed: int = 0) -> Suite:
    """Return the suite of a seed, with the text of the running Python."""
    return Suite(
        name="text",
        tasks=tuple(DOMAINS),
        seed=seed,
        sizes=SIZES,
        words=(),
        base=Stage(rows=5120, epochs=1, batch_size=8, learning_rate=3e-3),
        fine_tune=Stage(rows=1024, epochs=2, batch_size=8, learning_rate=1e-3),
        draw_base=_mixed,
        draw=draw_passages,
        provenance=provenance,
    )


def _mixed(domains: Sequence[str], count: int, seed: int) -> list[Passage]:
    each = count // len(domains)
    return [passage for domain in domains for passage in draw_passages(domain, each, seed)]
