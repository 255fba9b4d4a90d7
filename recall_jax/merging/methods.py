"""The merge methods: each one's name, parameters, and what it needs.

A method merges one tensor at a time: its kernel takes the K models' arrays and the values that its
rule gives for the tensor, such as their weights. To add one, write its kernel, the equation in its
docstring, in a file of this room, and give it a line in `METHODS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Any, ClassVar, Literal, Protocol

import jax
from jax.typing import DTypeLike
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict

from recall_jax.merging import average
from recall_jax.merging.dare import dare
from recall_jax.merging.magmax import magmax
from recall_jax.merging.opcm import opcm
from recall_jax.merging.regmean import regmean
from recall_jax.merging.task_arithmetic import task_arithmetic
from recall_jax.merging.ties import ties
from recall_jax.merging.weights import Merged, Weighing

Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Gradient = Annotated[list[Number], Field(min_length=1)]
Positive = Annotated[Number, Field(gt=0)]


class FilteredValue(BaseModel):
    """A value for the tensors whose name contains `filter`; "*" or none matches all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    filter: str | None = None
    value: Number | Gradient


# A number, a gradient over the layers, or the first match of a list of filters.
ParameterValue = Number | Gradient | Annotated[list[FilteredValue], Field(min_length=1)]


class Parameters(BaseModel):
    """A method's parameters; keys that it does not know are refused.

    Those of `by_tensor` can differ between tensors: the rule gives the kernel their values.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)
    by_tensor: ClassVar[tuple[str, ...]] = ()

    # mergekit's memory option: accepted, and without effect on a float32 computation.
    int8_mask: Annotated[bool, Strict(), Field(exclude=True)] = False


class LinearParameters(Parameters):
    """`linear`: `weight` for models without one of their own; `normalize` divides by their sum."""

    weight: ParameterValue | None = None
    normalize: Annotated[bool, Strict()] = True


class LinearModelParameters(Parameters):
    """`linear`, for each model: its weight."""

    by_tensor = ("weight",)
    weight: ParameterValue | None = None


def _fractions(value: ParameterValue | None) -> ParameterValue | None:
    """`value`, if all of its numbers are in [0, 1]."""
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, FilteredValue):
            _fractions(part.value)
        elif part is not None and not 0 <= part <= 1:
            raise ValueError(f"should be a share from 0 to 1, not {part}")
    return value


Share = Annotated[ParameterValue, AfterValidator(_fractions)]


class TaskVectorModelParameters(Parameters):
    """Methods of task vectors, for each model: its weight, and the share of elements it keeps."""

    by_tensor = ("weight", "density")
    weight: ParameterValue | None = None
    density: Share | None = None


class TaskVectorParameters(Parameters):
    """Methods of task vectors: what is theirs, and `weight` and `density` of models without.

    `normalize` divides by the sum of the weights, `rescale` gives a sparse task vector its L1 norm
    from before. Where nothing is made sparse, `density` and `rescale` are accepted and do nothing.
    """

    by_tensor = ("lambda_",)
    weight: ParameterValue | None = None
    density: Share = 1.0
    normalize: Annotated[bool, Strict()] = False
    rescale: Annotated[bool, Strict()] = False
    lambda_: ParameterValue = Field(1.0, alias="lambda")


class TiesParameters(TaskVectorParameters):
    """`ties`."""

    normalize: Annotated[bool, Strict()] = True


class DareParameters(TaskVectorParameters):
    """`dare_linear` and `dare_ties`: `seed` is that of the draw; see `dare` for `rescale`."""

    rescale: Annotated[bool, Strict()] | Literal["density"] = True  # type: ignore[assignment]
    seed: Annotated[int, Strict(), Field(ge=0)] = 0


class MagMaxParameters(Parameters):
    """`magmax`."""

    by_tensor = ("lambda_",)
    lambda_: ParameterValue = Field(1.0, alias="lambda")


class OpcmParameters(Parameters):
    """`opcm`: the share of a spectrum that counts as taken."""

    alpha: Annotated[Number, Field(ge=0, le=1)] = 0.5


class RegMeanParameters(Parameters):
    """`regmean` and `regmean_plusplus`: what is left of a Gram off its diagonal."""

    by_tensor = ("alpha",)
    alpha: Annotated[Number, Field(ge=0, lt=1)] = 0.9


class CocktailParameters(Parameters):
    """`lm_cocktail`: the temperature, in nats, of the softmax over the models' losses."""

    temperature: Positive = 5.0


class RecallParameters(Parameters):
    """`recall`: how the models are compared, and how their similarities become weights."""

    sigma: Positive | Literal["median", "dim"] = "median"
    temperature: Positive = 1.0
    reference: Annotated[int, Strict()] | str = "newest"
    similarity: str | dict[str, Positive] = "rbf"
    alignment: Literal["none", "center", "procrustes"] = "none"
    merged_units: Merged = "all"
    threshold: Number | None = None

    @property
    def weighing(self) -> Weighing:
        """What the weights depend on beside the similarities."""
        return Weighing(self.temperature, self.merged_units, self.threshold)


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
    each. A kernel that needs `whole_tensors` is not given pieces of them.
    """

    kernel: Callable[[Any], Kernel]
    parameters: type[Parameters] = Parameters
    model_parameters: type[Parameters] = Parameters
    min_models: int = 1
    needs_base: bool = False
    whole_tensors: bool = False
    samples: Literal["none", "newest", "each"] = "none"
    rule: Literal["parameters", "recall", "opcm", "regmean", "regmean_plusplus", "lm_cocktail"] = (
        "parameters"
    )
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
        whole_tensors=True,
        equation="θ = θ_base + λ Σₖ wₖ trim(θₖ − θ_base), of the elected signs",
    ),
    "dare_linear": Method(
        lambda p: fixed(dare, consensus=False, normalize=p.normalize, rescale=p.rescale),
        parameters=DareParameters,
        model_parameters=TaskVectorModelParameters,
        needs_base=True,
        whole_tensors=True,
        equation="θ = θ_base + λ Σₖ wₖ drop(θₖ − θ_base)",
    ),
    "dare_ties": Method(
        lambda p: fixed(dare, consensus=True, normalize=p.normalize, rescale=p.rescale),
        parameters=DareParameters,
        model_parameters=TaskVectorModelParameters,
        needs_base=True,
        whole_tensors=True,
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
        whole_tensors=True,
        rule="opcm",
        equation="θ = θ_base + Σₖ Pₖ(θₖ − θ_base) / λ, Pₖ off what came before",
    ),
    "regmean": Method(
        lambda parameters: regmean,
        parameters=RegMeanParameters,
        min_models=2,
        whole_tensors=True,
        samples="each",
        rule="regmean",
        equation="W = (Σₖ Gₖ)⁻¹ Σₖ Gₖ Wₖ, Gₖ = Xₖᵀ Xₖ of what a linear layer reads",
    ),
    "regmean_plusplus": Method(
        lambda parameters: regmean,
        parameters=RegMeanParameters,
        min_models=2,
        whole_tensors=True,
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
}
