"""Whether models that are merged without being run are what their configs say, and of one kind."""

from collections.abc import Collection, Sequence

from recall_jax.checkpoint.tensors import shapes_of
from recall_jax.engine.plan import ConfiguredModel
from recall_jax.errors import InputError
from recall_jax.models.config import read_architecture
from recall_jax.models.differences import config_differences, told
from recall_jax.models.shapes import check_shapes, check_sizes


def check_configs(
    models: Sequence[ConfiguredModel], ignore_config: Collection[str] = ()
) -> list[str]:
    """Hold each model's tensors to its config, and its config to that of the newest (last) model.

    Returns a warning for each attribute that changes what a model computes, since the merged model
    has the newest's. Raises InputError where tensors have another shape than the config of
    a known family says.
    """
    for model in models:
        _check_shapes(model, ignore_config)
    newest, warnings = models[-1], []
    for model in models[:-1]:
        found = config_differences(model.config, newest.config, ignore_config)
        warnings += [
            f"{line}: the merged model computes with the latter"
            for line in told(found, model.name, newest.name)
        ]
    return warnings


def _check_shapes(model: ConfiguredModel, ignore_config: Collection[str]) -> None:
    shapes = shapes_of(model.specs)
    check_sizes(model.config, shapes, model.name)
    try:
        arch = read_architecture(model.config, ignore=ignore_config)
    except InputError:
        return  # no method that runs models takes it, but others take every family's
    check_shapes(arch, shapes, model.name)
