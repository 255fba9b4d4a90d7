"""The parameters of the merge methods, as a recipe gives them.

Each method has a class for its own, and one for those of each model if there are some.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict

from recall_jax.methods.weights import Merged, Weighing

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


class DistillParameters(Parameters):
    """`recall_distill`: what the coefficients are, and how they are refined.

    `match` weighs what is asked of the merged model's outputs: `js` or `kl` of its next-token
    distributions at `temperature`, `hidden` of its pooled states. `anchor` weighs the base among
    the models that are to be matched.
    """

    coefficients: Literal["unit", "tensor"] = "unit"
    match: Annotated[dict[Literal["js", "kl", "hidden"], Positive], Field(min_length=1)] = {
        "js": 1.0
    }
    anchor: Annotated[Number, Field(ge=0)] = 1.0
    temperature: Positive = 1.0
    steps: Annotated[int, Strict(), Field(ge=0)] = 150
    learning_rate: Positive = 0.02
