"""The merge methods: each one's name, parameters, and what it needs.

A method merges one tensor at a time: its kernel takes the K models' arrays and the values that its
rule gives for the tensor, such as their weights. To add one, write its kernel, the equation in its
docstring, in a file of this room, its parameters in `parameters`, and an entry of `METHODS`. One
whose values are not in the recipe needs a rule too: a function from `Merge` to `Prepared` in the
engine (`engine.rules` says what these are), and the rule's name in `Method` and in `jobs.merge`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, Protocol

import jax
from jax.typing import DTypeLike

from recall_jax.methods import average
from recall_jax.methods.dare import dare
from recall_jax.methods.magmax import magmax
from recall_jax.methods.opcm import opcm
from recall_jax.methods.parameters import (
    CocktailParameters,
    DareParameters,
    DistillParameters,
    LinearModelParameters,
    LinearParameters,
    MagMaxParameters,
    OpcmParameters,
    Parameters,
    RecallParameters,
    RegMeanParameters,
    TaskVectorModelParameters,
    TaskVectorParameters,
    TiesParameters,
)
from recall_jax.methods.regmean import regmean
from recall_jax.methods.task_arithmetic import task_arithmetic
from recall_jax.methods.ties import ties

Whole = Literal["none", "linear", "all"]

# For one tensor: (K,) of the models, () of the recipe, or what else a rule has for a kernel.
Values = Mapping[str, jax.Array]


class Kernel(Protocol):
    """Merges a tensor, in float32, and rounds once."""

    def __call__(
        self,
        models: Sequence[jax.Array],
        values: Values,
        *,
        base: jax.Array | None,
        reference: int,
        dtype: DTypeLike,
    ) -> jax.Array:
        """From the K arrays of one shape, and the base's, to one of `dtype`.

        `reference` is the model whose elements pass where all agree.
        """


@cache
def fixed(kernel: Callable[..., jax.Array], **options: Any) -> Kernel:
    """The kernel with its options; for the same ones the same object, as jit wants it."""
    return partial(kernel, **options)


@dataclass(frozen=True)
class Method:
    """A merge method. `kernel` picks the function that merges a tensor, by the parameters.

    `rule` says where the kernel's values come from: the recipe's `parameters` alone, or what
    running the models tells. `samples` are what they run on: none, the newest model's, or those of
    each. A kernel that takes `whole_tensors` is not given pieces of these: the weights of linear
    layers, or all.
    """

    kernel: Callable[[Any], Kernel]
    parameters: type[Parameters] = Parameters
    model_parameters: type[Parameters] = Parameters
    min_models: int = 1
    needs_base: bool = False
    whole_tensors: Whole = "none"
    samples: Literal["none", "newest", "each"] = "none"
    rule: Literal[
        "parameters",
        "recall",
        "opcm",
        "regmean",
        "regmean_plusplus",
        "lm_cocktail",
        "recall_distill",
    ] = "parameters"
    equation: str = ""  # for the report: of a tensor theta, in a line

    @property
    def takes_weights(self) -> bool:
        """Whether weights known for each unit beforehand can stand in for its own."""
        return self.rule == "recall" or "weight" in self.model_parameters.by_tensor


METHODS: dict[str, Method] = {
    "recall": Method(
        lambda parameters: average.average,
        parameters=RecallParameters,
        min_models=2,
        samples="newest",
        rule="recall",
        equation="θ = Σₖ wₖ θₖ, in each unit",
    ),
    "linear": Method(
        # Weights that sum to one keep what all models share exact.
        lambda parameters: average.average if parameters.normalize else average.total,
        parameters=LinearParameters,
        model_parameters=LinearModelParameters,
        equation="θ = Σₖ wₖ θₖ",
    ),
    "average": Method(lambda parameters: average.average, equation="θ = Σₖ wₖ θₖ"),
    "task_arithmetic": Method(
        lambda p: fixed(task_arithmetic, normalize=p.normalize),
        parameters=TaskVectorParameters,
        model_parameters=TaskVectorModelParameters,
        needs_base=True,
        equation="θ = θ_base + λ Σₖ wₖ (θₖ − θ_base)",
    ),
    "ties": Method(
        lambda p: fixed(ties, normalize=p.normalize, rescale=p.rescale),
        parameters=TiesParameters,
        model_parameters=TaskVectorModelParameters,
        needs_base=True,
        whole_tensors="all",
        equation="θ = θ_base + λ Σₖ wₖ trim(θₖ − θ_base), of the elected signs",
    ),
    "dare_linear": Method(
        lambda p: fixed(dare, consensus=False, normalize=p.normalize, rescale=p.rescale),
        parameters=DareParameters,
        model_parameters=TaskVectorModelParameters,
        needs_base=True,
        whole_tensors="all",
        equation="θ = θ_base + λ Σₖ wₖ drop(θₖ − θ_base)",
    ),
    "dare_ties": Method(
        lambda p: fixed(dare, consensus=True, normalize=p.normalize, rescale=p.rescale),
        parameters=DareParameters,
        model_parameters=TaskVectorModelParameters,
        needs_base=True,
        whole_tensors="all",
        equation="θ = θ_base + λ Σₖ wₖ drop(θₖ − θ_base), of the elected signs",
    ),
    "magmax": Method(
        lambda parameters: fixed(magmax),
        parameters=MagMaxParameters,
        needs_base=True,
        equation="θ = θ_base + λ (θₖ − θ_base), each element of the k where it is largest",
    ),
    "opcm": Method(
        lambda parameters: fixed(opcm),
        parameters=OpcmParameters,
        needs_base=True,
        whole_tensors="linear",
        rule="opcm",
        equation="θ = θ_base + Σₖ Pₖ(θₖ − θ_base) / λ, Pₖ off what came before",
    ),
    "regmean": Method(
        lambda parameters: regmean,
        parameters=RegMeanParameters,
        min_models=2,
        whole_tensors="linear",
        samples="each",
        rule="regmean",
        equation="W = (Σₖ Gₖ)⁻¹ Σₖ Gₖ Wₖ, Gₖ = Xₖᵀ Xₖ of what a linear layer reads",
    ),
    "regmean_plusplus": Method(
        lambda parameters: regmean,
        parameters=RegMeanParameters,
        min_models=2,
        whole_tensors="linear",
        samples="each",
        rule="regmean_plusplus",
        equation="W = (Σₖ Gₖ)⁻¹ Σₖ Gₖ Wₖ, Gₖ = Xₖᵀ Xₖ behind the merged units before",
    ),
    "lm_cocktail": Method(
        lambda parameters: average.average,
        parameters=CocktailParameters,
        min_models=2,
        samples="newest",
        rule="lm_cocktail",
        equation="θ = Σₖ wₖ θₖ, w = softmax(−loss / T)",
    ),
    "recall_distill": Method(
        lambda parameters: fixed(task_arithmetic, normalize=False),
        parameters=DistillParameters,
        min_models=2,
        needs_base=True,
        samples="each",
        rule="recall_distill",
        equation="θ = θ_base + Σₖ cₖ (θₖ − θ_base), c refined from RECALL's weights",
    ),
}
