"""Load merge methods from Python files that define them in `METHODS`."""

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recall_jax.errors import InputError, running_user_code, shown
from recall_jax.methods.method import Method
from recall_jax.methods.registry import METHODS


def load_plugins(paths: Iterable[Path]) -> None:
    """Run the files, and register the methods in the `METHODS` of each.

    A file that was loaded before is not run again. Raises InputError if a file cannot be run, if
    its `METHODS` are not valid, or if a name is taken.
    """
    for path in paths:
        module_name = f"recall_jax_plugin:{path.resolve()}"
        if module_name in sys.modules:
            continue
        try:
            _register(_run(path, module_name), path)
        except InputError:
            sys.modules.pop(module_name, None)
            raise


def _run(path: Path, module_name: str) -> Any:
    """Run a file as a module, and return its `METHODS`."""
    if path.suffix != ".py" or not path.is_file():
        raise InputError(f"plugin {path} is not a Python file: give one that ends in .py")
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look classes up there
    with running_user_code(f"plugin {path} cannot be run"):
        spec.loader.exec_module(module)
    return getattr(module, "METHODS", None)


def _register(methods: Any, path: Path) -> None:
    if not isinstance(methods, dict) or not methods:
        raise InputError(
            f"plugin {path} adds no method: give it METHODS, such as {{'median': Method(...)}}"
        )
    for name, method in methods.items():
        if not isinstance(name, str) or not isinstance(method, Method):
            raise InputError(
                f"plugin {path}: METHODS has {shown(name)}: {shown(method)}, which is not a name "
                "with a recall_jax.methods.method.Method"
            )
        if name in METHODS:
            raise InputError(
                f"plugin {path}: there is already a method {name}: choose another name"
            )
    METHODS.update(methods)
