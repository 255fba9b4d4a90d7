"""Spare the tests what they need not wait for: optimised programs, contexts of MLIR, devices."""

import functools
import threading
from typing import Any

import jax
from jax._src import compiler
from jax._src.interpreters import mlir

# How XLA compiles where jax optimises least: without fusion emitters, which are slow to compile,
# all of a program at once, and without what only optimisers read.
HASTE = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_llvm_force_inline_before_split": False,
    "xla_llvm_enable_alias_scope_metadata": False,
    "xla_llvm_enable_invariant_load_metadata": False,
    "xla_llvm_enable_noalias_metadata": False,
}

get_compile_options = compiler.get_compile_options
make_context = mlir.make_ir_context


def in_haste() -> bool:
    return jax.config.read("jax_disable_most_optimizations")


def get_hasty_options(*arguments: Any, env_options_overrides=None, **options: Any) -> Any:
    """As jax's own, and in haste where it optimises least."""
    if in_haste():
        env_options_overrides = dict(env_options_overrides or {}) | HASTE
    return get_compile_options(*arguments, env_options_overrides=env_options_overrides, **options)


class Context(threading.local):
    """Keep the context in which a thread writes all of its programs.

    jax makes one for each program, which takes a twentieth of the tests' time, and keeps a megabyte
    as long as the program lives.
    """

    def __init__(self) -> None:
        self.context = make_context()


@functools.cache
def all_devices() -> list[jax.Device]:
    return jax.devices()


def hasten() -> None:
    """Let jax compile in haste from now on, and share contexts."""
    contexts = Context()
    compiler.get_compile_options = get_hasty_options
    mlir.make_ir_context = lambda: contexts.context


def optimise(optimised: bool) -> None:
    """Compile programs as users have them, or else in haste."""
    if optimised == in_haste():
        jax.config.update("jax_disable_most_optimizations", not optimised)
        jax.clear_caches()


def show_devices(count: int) -> None:
    """Let those who ask jax for its devices see the first of them alone."""
    devices = all_devices()[:count]
    jax.devices = jax.local_devices = lambda *arguments, **options: list(devices)
    jax.device_count = jax.local_device_count = lambda *arguments, **options: count
