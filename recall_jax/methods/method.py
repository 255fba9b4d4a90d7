"""Define a merge method: its equation, parameters, kernel, and needs."""

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
    """Declare a complete merge method; all other code reads this declaration, and never the name.

    `kernel(parameters)` returns the function that merges a tensor. `parameters` and
    `model_parameters` are the schemas of a recipe's parameters, for the merge and for each model.
    `needs` declares what merging needs. `prepare` returns the rule with the kernel's values, by
    default from the parameters; methods that observe the models run them there. `check(parameters,
    models)` raises InputError if parameters do not fit each other or the models as the recipe names
    them. If `weighs_units`, the rule's values are a weight for each model and unit, which can be
    read from a weights file instead. `equation` is a line for the report, for a tensor theta.
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
        """Return whether weights known for each unit can replace those of the method."""
        return self.weighs_units or "weight" in self.model_parameters.by_tensor
