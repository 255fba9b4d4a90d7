"""Describe low-rank updates of linear layers (LoRA, Hu et al. 2021, arXiv:2106.09685).

A `LoraSpec` lists the layers that have one; `decoder.Linear` adds it if its variables hold the two
factors: y = W x + scale B A dropout(x).
"""

import math
from dataclasses import dataclass
from numbers import Real

from recall_jax.errors import InputError, shown
from recall_jax.models.architecture import LAYERS, Architecture
from recall_jax.models.families import FAMILIES

ALL_LINEAR = "all-linear"
"""The target module that stands for every linear layer of every block, as in peft."""
_WEIGHT, _KERNEL = ".weight", "/kernel"


@dataclass(frozen=True)
class LoraSpec:
    """Describe an adapter without its numbers; the defaults are those of the RECALL paper.

    target_modules are names of linear layers (`q_proj`), or `all-linear`. `dropout` is the
    fraction of a layer's inputs that is dropped from its update in training; none in evaluation.
    """

    r: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    use_rslora: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range; names are checked by `adapted_modules`."""
        if type(self.r) is not int or self.r < 1:
            raise InputError(f"LoRA: r must be a positive integer, not {shown(self.r)}")
        if not _is_number(self.alpha) or self.alpha <= 0:
            raise InputError(f"LoRA: alpha must be a positive number, not {shown(self.alpha)}")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise InputError(
                f"LoRA: dropout must be at least 0 and below 1, not {shown(self.dropout)}"
            )
        if not isinstance(self.target_modules, tuple) or not self.target_modules:
            raise InputError(
                f"LoRA: target_modules must be a tuple of names, or ({ALL_LINEAR!r},), "
                f"not {shown(self.target_modules)}"
            )

    @property
    def scale(self) -> float:
        """Return the update's factor: alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def adapted_modules(arch: Architecture, spec: LoraSpec) -> dict[str, str]:
    """Map the Flax path of each adapted layer in a block to its Hugging Face name there.

    A target matches a name that equals it or ends in a dot and it, as in peft.

    Raises:
        InputError: if the architecture lacks a target; names all that it lacks.
    """
    linear = {
        path.removesuffix(_KERNEL): name.removesuffix(_WEIGHT)
        for name, path in FAMILIES[arch.family].tensors[LAYERS].items()
        if path.endswith(_KERNEL)
    }
    fits = {
        target: [
            path
            for path, name in linear.items()
            if target == ALL_LINEAR or f".{name}".endswith(f".{target}")
        ]
        for target in spec.target_modules
    }
    if unknown := [target for target, paths in fits.items() if not paths]:
        known = ", ".join(name.rpartition(".")[2] for name in linear.values())
        raise InputError(
            f"LoRA: {arch.family} blocks have no linear layer {', '.join(map(repr, unknown))}; "
            f"target_modules may name {known}, or be {ALL_LINEAR}"
        )
    chosen = {path for paths in fits.values() for path in paths}
    return {path: name for path, name in linear.items() if path in chosen}


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
