"""Check models that are merged without being run against their configs, and against each other."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from recall_jax.checkpoint.tensors import shapes_of
from recall_jax.engine.plan import ConfiguredModel
from recall_jax.errors import InputError
from recall_jax.models.config import read_architecture
from recall_jax.models.differences import config_differences, describe_differences
from recall_jax.models.shapes import check_shapes, check_sizes


def check_configs(
    models: Sequence[ConfiguredModel], ignore_config: Collection[str] = ()
) -> list[str]:
    """Check each model's tensors against its config, and its config against the newest model's.

    The newest is the last. Returns a warning for each attribute that changes what a model computes,
    since the merged model has the newest model's config. Raises InputError if tensors have other
    shapes than the config of a known family says.
    """
    for model in models:
        _check_shapes(model, ignore_config)
    return config_warnings([(model.name, model.config) for model in models], ignore_config)


def config_warnings(
    configs: Sequence[tuple[str, Mapping[str, Any]]], ignore_config: Collection[str] = ()
) -> list[str]:
    """Return the warnings of `check_configs` for (name, config) pairs, the newest last."""
    *older, (newest, newest_config) = configs
    return [
        f"{line}: the merged model computes with the latter"
        for name, config in older
        for line in describe_differences(
            config_differences(config, newest_config, ignore_config), name, newest
        )
    ]


def _check_shapes(model: ConfiguredModel, ignore_config: Collection[str]) -> None:
    shapes = shapes_of(model.specs)
    check_sizes(model.config, shapes, model.name)
    try:
        arch = read_architecture(model.config, ignore=ignore_config)
    except InputError:
        return  # of an unknown family: only methods that run no model accept it
    check_shapes(arch, shapes, model.name)
