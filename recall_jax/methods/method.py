"""A merge method: its equation, parameters and kernel, and what it needs to run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from recall_jax.engine.kernel import Kernel
from recall_jax.engine.merge import Merge, Prepared
from recall_jax.engine.needs import NO_NEEDS, Needs
from recall_jax.methods.parameters import Parameters
from recall_jax.methods.values import prepare_from_parameters

P = TypeVar("P", bound=Parameters)
M = TypeVar("M", bound=Parameters)


def accept(parameters: Parameters, models: Sequence[str]) -> None:
    """Accept all parameters that the schema accepts."""


@dataclass(frozen=True)
class Method(Generic[P, M]):
    """A merge method, complete: everything else reads what it declares, and never its name.

    `kernel(parameters)` returns the function that merges a tensor. `parameters` and
    `model_parameters` are the schemas of what a recipe gives, in all and for each model. `needs`
    declares what merging takes. `prepare` makes the rule that has the kernel's values: by default
    those of the parameters; a method that observes the models runs them there. `check(parameters,
    models)` raises InputError where parameters do not fit together, or with the models as the
    recipe names them. With `weighs_units` the rule's values are a weight of each model in each
    unit, which a file of weights can give instead. `equation` is a line for the report, of a tensor
    theta.
    """

    kernel: Callable[[P], Kernel]
    parameters: type[P] = Parameters  # type: ignore[assignment]
    model_parameters: type[M] = Parameters  # type: ignore[assignment]
    needs: Needs = NO_NEEDS
    prepare: Callable[[Merge[P, M]], Prepared] = prepare_from_parameters
    check: Callable[[P, Sequence[str]], object] = accept
    weighs_units: bool = False
    equation: str = ""

    @property
    def takes_weights(self) -> bool:
        """Whether weights known for each unit beforehand can stand in for the method's own."""
        return self.weighs_units or "weight" in self.model_parameters.by_tensor
