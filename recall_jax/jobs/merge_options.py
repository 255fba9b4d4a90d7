"""How a merge is run: memory, devices, processes, and the form of its output."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from recall_jax.checkpoint.writer import DEFAULT_SHARD_BYTES
from recall_jax.errors import InputError
from recall_jax.parallel.processes import ALONE, Processes


@dataclass(frozen=True)
class MergeOptions:
    """How a merge is run; the recipe says what is merged.

    `memory` is the budget in bytes, by default a share of what is free. OUT must replace neither
    the recipe's files, nor `inputs`, nor the `plugins`, which `recipes.plugins` has loaded. A
    `mesh`, such as "data=2,fsdp=4" or "auto", distributes all tensors over the devices of all
    `processes` that run this same merge together; they write into one folder, or with `parts` each
    into an OUT of its own. The weights are written `to` "huggingface" (safetensors), which can be
    resumed, or "orbax", the Flax tree that `jobs.convert` writes, which is on disk only at the end.
    """

    force: bool = False
    resume: bool = False
    shard_bytes: int = DEFAULT_SHARD_BYTES
    memory: int | None = None
    inputs: Collection[Path] = ()
    plugins: Collection[Path] = ()
    mesh: str | None = None
    processes: Processes = ALONE
    parts: bool = False
    to: str = "huggingface"

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if self.to not in ("huggingface", "orbax"):
            raise InputError(f"a merge cannot be written to {self.to!r}: use huggingface or orbax")
        if self.parts and self.to == "orbax":
            raise InputError(
                "--parts is for safetensors: Orbax writes into a folder that all share"
            )
        if self.parts and self.processes.count == 1:
            raise InputError("--parts is for several processes, and there is one: leave it out")

    @property
    def distributed(self) -> bool:
        """Whether tensors are distributed over a mesh of devices."""
        return self.mesh is not None or self.processes.count > 1

    @property
    def files(self) -> list[Path]:
        """The user's files that a merge is run with, other than those the recipe names."""
        return [*self.inputs, *self.plugins]


DEFAULTS = MergeOptions()
