"""What identifies a merge: to the processes that run it together, and to one that resumes it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.engine.budget import machine_bytes
from recall_jax.engine.journal import input_files
from recall_jax.engine.layout import Layout
from recall_jax.engine.sources import Inputs
from recall_jax.jobs.merge_options import MergeOptions
from recall_jax.jobs.outcome import resolved
from recall_jax.parallel.machine import device, versions
from recall_jax.recipes.recipe import Recipe


def common_request(recipe: Recipe, out: Path, options: MergeOptions) -> dict[str, Any]:
    """Return what must be the same in all processes that run a merge."""
    return {
        "recipe": recipe.model_dump(mode="json"),
        "OUT": None if options.parts else str(out),
        "--resume": options.resume,
        "--mesh": options.mesh,
        "--parts": options.parts,
        "--to": options.to,
        "--shard-size": options.shard_bytes,
        "version": versions(),
    }


def file_digests(model: Checkpoint) -> list[str]:
    """Return size and hash of each file of a model; its place and time may differ."""
    found = model.fingerprint(content=False).values()
    return sorted(f"{size} {digest}" for size, *_, digest in found)


def merge_identity(
    recipe: Recipe, inputs: Inputs[Checkpoint], options: MergeOptions, layout: Layout
) -> dict[str, Any]:
    """Return what must be the same for a merge to go on where another has stopped."""
    repeatable = resolved(recipe, inputs, recipe.compute_dtype)
    return {
        "inputs": identify_files(recipe, inputs.all, options),
        "recipe": repeatable.model_dump(mode="json"),
        "program": {
            **versions(),
            "device": device(),
            "shard_size": options.shard_bytes,
            "layout": layout.description,
            "mesh": layout.mesh and dict(layout.mesh.shape),
            "to": options.to,
        },
    }


def identify_files(
    recipe: Recipe, read: Sequence[Checkpoint], options: MergeOptions
) -> dict[str, Any]:
    """Return, by path, what identifies each file that a merge reads.

    Weights that fit in this machine's memory are identified by their content, which the walk then
    finds there; others by their times, as reading them once more would be most of a merge.
    """
    held = sum(model.nbytes for model in read) <= machine_bytes()
    content = held and options.processes.count == 1 and options.to == "huggingface"
    return input_files(read, [*_recipe_files(recipe), *options.plugins], content=content)


def merge_input_paths(recipe: Recipe, models: Sequence[Checkpoint]) -> list[Path]:
    """Return every file and folder that a recipe names or its models consist of."""
    folders = [folder for model in models for folder in (model.folder, *model.adapters)]
    return [*folders, *_recipe_files(recipe)]


def _recipe_files(recipe: Recipe) -> list[Path]:
    files = [recipe.weights, recipe.base_data, *(entry.data for entry in recipe.models)]
    if recipe.samples is not None:
        files += [recipe.samples.data, recipe.samples.typical, recipe.samples.prompts]
    return [Path(name) for name in files if name]
