"""W + BA is float32 until it is written: what comes out is what peft makes of a float32 base."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from peft_models import (
    config,
    load,
    logits,
    merged,
    our_logits,
    parameters,
    recipe,
    save_adapter,
    save_base,
    tensors,
)

from recall_jax.evaluation.resident import load_resident

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning")

FRESH = 1e-4  # what some hundred steps of a usual learning rate move B by


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def half(request, tmp_path_factory) -> tuple[str, str, str]:
    """A base of two bytes a number, and two freshly trained adapters of it."""
    folder = tmp_path_factory.mktemp("half")
    base = save_base(folder / "base", tied=False, dtype=request.param)
    linear = ["q_proj", "v_proj", "down_proj"]
    one = save_adapter(base, folder / "one", size=FRESH, target_modules=linear)
    two = save_adapter(base, folder / "another", size=FRESH, target_modules=["k_proj", "q_proj"])
    return base, one, two


def dtypes(folder: str | Path) -> set[str]:
    return {array.dtype.name for array in tensors(folder).values()}


def test_a_float32_conversion_is_peft_s_float32_merge(half, run) -> None:
    base, one, two = half
    for adapters in ([one], [one, two]):
        out = run("convert", "--force", "--dtype", "float32", "+".join([base, *adapters]), "out")
        expected = parameters(merged(base, *adapters))
        for name, array in tensors(out).items():
            assert array.dtype == np.float32
            assert_allclose(array, expected[name], rtol=0, atol=1e-6, err_msg=name)


def test_a_conversion_rounds_once(half, run) -> None:
    base, one, _ = half
    found = tensors(run("convert", f"{base}+{one}", "out"))
    assert dtypes("out") == dtypes(base)
    assert config("out")["dtype"] == config(base)["dtype"]
    for name, exact in parameters(merged(base, one)).items():
        rounded = exact.astype(found[name].dtype)
        # the two float32 sums differ in their last bits, which seldom decides
        assert np.mean(found[name] != rounded) < 2e-3, name


def test_a_merge_keeps_what_half_precision_would_lose(half, run) -> None:
    base, one, two = half
    models = f"{base}+{one}", f"{base}+{two}"
    first, second = parameters(merged(base, one)), parameters(merged(base, two))
    run("merge", recipe("average", *models, out_dtype="float32"), "wide")
    for name, array in tensors("wide").items():
        assert_allclose(array, (first[name] + second[name]) / 2, rtol=0, atol=1e-6, err_msg=name)
    run("merge", recipe("average", *models), "narrow")
    assert dtypes("narrow") == dtypes(base)


def test_the_task_vector_of_a_fresh_adapter_is_its_update(half, run) -> None:
    base, one, _ = half
    settings = {"base": base, "out_dtype": "float32", "parameters": {"weight": 0.5}}
    text = recipe("task_arithmetic", f"{base}+{one}", f"{base}+{one}", **settings)
    found = tensors(run("merge", text, "out"))
    narrow = next(iter(tensors(base).values())).dtype
    start, end = parameters(load(base)), parameters(merged(base, one))
    changed = [name for name in found if np.any(end[name] != start[name])]
    assert len(changed) == 3 * 3
    for name in found:
        update = end[name] - start[name]
        size = np.linalg.norm(update)
        assert np.linalg.norm(found[name] - start[name] - update) <= 1e-3 * size, name
        lost = end[name].astype(narrow).astype(np.float32) - end[name]
        assert np.linalg.norm(lost) >= 0.05 * size or name not in changed


def test_a_model_in_memory_is_peft_s_in_float32(half) -> None:
    base, one, _ = half
    resident = load_resident(f"{base}+{one}")
    expected = logits(merged(base, one))
    assert_allclose(our_logits(resident.arch, resident.params), expected, rtol=0, atol=3e-6)
    rounded = merged(base, one).bfloat16().float()
    assert np.abs(logits(rounded) - expected).max() > 1e-4


def test_representations_are_those_of_the_float32_model(half, toys, run) -> None:
    base, one, _ = half
    run("convert", "--dtype", "float32", f"{base}+{one}", "whole")
    reps = []
    for model, out in (("whole", "whole.npz"), (f"{base}+{one}", "folded.npz")):
        run("extract", model, "--data", toys.data, "--pool", "4", "--out", out)
        with np.load(out) as file:
            reps.append(file["reps"])
    assert_allclose(*reps, rtol=0, atol=1e-7)


def test_a_finetuning_of_a_folded_model_keeps_the_dtype_of_its_base(half, toys, run) -> None:
    base, one, _ = half
    options = ["--data", toys.data, "--steps", "1", "--batch-size", "2", "--warmup", "0"]
    run("finetune", f"{base}+{one}", *options, "--out", "out")
    assert dtypes("out") == dtypes(base)
