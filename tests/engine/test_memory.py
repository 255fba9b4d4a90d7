"""Memory does not grow with depth, and need not hold even one of the models."""

import sys

import ml_dtypes
import numpy as np
import pytest
from deep_models import (
    PROMPT_FREE,
    largest_unit,
    move_off_alignment,
    watch,
    write_linear_recipe,
    write_model,
)
from toys import write_rows

pytestmark = [
    pytest.mark.optimised,
    pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's"),
]
MIB = 1 << 20
TEXTS = ["abcdef", "hXYZ01 a", "f0f1"]
LIMIT = 600 * MIB  # of data, the stacks of threads included
HIDDEN_STATES = 3 * 16 * 512 * 4  # rows, padded length, hidden size, float32


def merge_by(method, models, out, tmp_path):
    """The command line of a merge that reads each model once."""
    if method == "linear":
        return "merge", write_linear_recipe(tmp_path / "linear.yml", models), out
    typical = write_rows(tmp_path / "typical.jsonl", TEXTS)
    return "quick", *models, "--typical", typical, "--out", out


@pytest.mark.parametrize(
    "dtype", [pytest.param(ml_dtypes.bfloat16, marks=pytest.mark.soak), np.float32]
)
def test_memory_is_the_same_at_every_depth(dtype, toys, tmp_path, cache):
    models = {
        layers: [
            write_model(
                toys.llama[0], tmp_path / f"{layers}-{k}", dtype, seed=k, num_hidden_layers=layers
            )
            for k in (0, 1)
        ]
        for layers in (9, 36)
    }
    unit = largest_unit(models[9][0])
    allowed = 700 * MIB + 1.5 * 2 * unit * 4 + 2 * HIDDEN_STATES
    for method in ("recall", "linear"):

        def peak(layers, method=method):
            out = tmp_path / f"{method}-{layers}"
            command = merge_by(method, models[layers], out, tmp_path)
            watched = watch(cache, out, *command, "--force", variables=PROMPT_FREE)
            assert len(watched.report["units"]) == layers + 2
            assert watched.peak <= min(allowed, watched.report["memory"]["planned_bytes"])
            return watched.peak

        peak(9)  # compiles
        peaks = {layers: peak(layers) for layers in models}
        # Threads that meet otherwise in one run may take more: what a depth needs is the least.
        for _ in range(15):
            most = max(peaks, key=peaks.__getitem__)
            if peaks[most] <= 1.05 * min(peaks.values()):
                break
            peaks[most] = min(peaks[most], peak(most))
        print(method, {layers: round(each / MIB, 1) for layers, each in peaks.items()})
        assert max(peaks.values()) <= 1.05 * min(peaks.values())
        # which would say nothing if the layers did not weigh in
        assert 27 * 2 * unit * np.dtype(dtype).itemsize > peaks[9]


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("recall", ml_dtypes.bfloat16),
        ("linear", np.float32),
        pytest.param("recall", np.float32, marks=pytest.mark.soak),
        pytest.param("linear", ml_dtypes.bfloat16, marks=pytest.mark.soak),
    ],
)
def test_memory_grows_with_the_width_by_few_units(method, dtype, toys, tmp_path, cache):
    """Tensors that do not lie aligned in their files have to be copied, and only for a while."""
    peaks, units = [], []
    for width in (1024, 8192):
        models = [
            move_off_alignment(
                write_model(
                    toys.llama[0],
                    tmp_path / f"{width}-{k}",
                    dtype,
                    seed=k,
                    num_hidden_layers=2,
                    intermediate_size=width,
                    hidden_size=1024,
                )
            )
            for k in range(2)
        ]
        out = tmp_path / f"out-{width}"
        runs = [
            watch(cache, out, *merge_by(method, models, out, tmp_path), "--force") for _ in range(2)
        ]
        peaks.append(min(run.peak for run in runs))
        units.append(largest_unit(models[0]) * 4)
        assert peaks[-1] <= runs[0].report["memory"]["planned_bytes"] <= 2.5 * peaks[-1]
    assert peaks[1] - peaks[0] <= 1.5 * 2 * (units[1] - units[0])


@pytest.mark.parametrize(
    ("method", "budget"),
    [("recall", "1100MiB"), pytest.param("linear", "400MiB", marks=pytest.mark.soak)],
)
def test_a_model_may_be_larger_than_the_memory(method, budget, toys, tmp_path, cache):
    models = [
        write_model(
            toys.llama[0],
            tmp_path / str(k),
            ml_dtypes.bfloat16,
            seed=k,
            num_hidden_layers=150,
            shard_bytes=200 << 20,
        )
        for k in (0, 1)
    ]
    size = sum(path.stat().st_size for path in models[0].glob("*.safetensors"))
    data = write_rows(tmp_path / "data.jsonl", TEXTS)  # of which two are chosen
    watched = {}
    for limit in (-1, LIMIT):
        out = tmp_path / f"out-{limit}"
        if method == "recall":
            command = ["quick", *models, "--data", data, "--count", 2, "--out", out]
        else:
            command = ["merge", write_linear_recipe(tmp_path / "linear.yml", models), out]
        watched[limit] = watch(cache, out, *command, "--memory", budget, data_limit=limit)
    free, tight = watched[-1], watched[LIMIT]
    assert size > LIMIT
    # kept from the selection to the merge are maps, which take no data
    assert tight.report["selection_passes"] == 0
    assert tight.checksums == free.checksums
    assert tight.report["weights"] == free.report["weights"]
