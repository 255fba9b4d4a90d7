"""The registry of measures. To add one, write its file in this room, and give it a line here."""

from math import inf

from recall_jax.errors import InputError
from recall_jax.similarity import centred, cka, paired
from recall_jax.similarity.measure import Measure

MEASURES: dict[str, Measure] = {
    "paired_rbf": Measure(paired.paired_rbf, paired.PAIRED_RBF, symmetric=False),
    "row_cosine": Measure(paired.row_cosine, paired.ROW_COSINE, bounds=(-1.0, 1.0)),
    "linear_cka": Measure(cka.linear_cka, cka.LINEAR, cka.LINEAR_FEATURES),
    "rbf_cka": Measure(cka.rbf_cka, cka.RBF),
    "debiased_linear_cka": Measure(
        cka.debiased_linear_cka, cka.DEBIASED_LINEAR, cka.DEBIASED_LINEAR_FEATURES
    ),
    "debiased_rbf_cka": Measure(cka.debiased_rbf_cka, cka.DEBIASED_RBF),
    "hsic": Measure(centred.hsic, centred.HSIC, bounds=(-inf, inf)),
}
# Shorter names that users know.
ALIASES = {"rbf": "paired_rbf", "cosine": "row_cosine", "cka": "linear_cka"}


def find_measure(name: str) -> Measure:
    """The measure of that name or alias; InputError, listing all, if there is none."""
    measure = MEASURES.get(ALIASES.get(name, name))
    if measure is None:
        known = ", ".join([*ALIASES, *MEASURES])
        raise InputError(f"unknown measure {name!r}: choose from {known}")
    return measure
