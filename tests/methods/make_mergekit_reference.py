"""Writes mergekit_reference.npz with mergekit 0.1.5's own functions, where that is installed.

    python tests/methods/make_mergekit_reference.py

A case is a method and its parameters: `CASES[name]` in the file, as JSON; its result is `name`.
"""

import json
from pathlib import Path

import numpy as np

SHAPE = (12, 17)
WEIGHTS = [0.7, -0.4, 1.1]
DENSITIES = [0.3, 0.62, 1.0]
SHARED = {"weight": WEIGHTS, "density": [1.0] * 3, "lambda": 1.0}
CASES = {
    "task_arithmetic": SHARED,
    "task_arithmetic normalize lambda": SHARED | {"normalize": True, "lambda": 0.6},
    "task_arithmetic zero normalize": SHARED | {"weight": [1.0, -1.0, 0.0], "normalize": True},
    "ties": SHARED | {"density": DENSITIES},
    "ties of one element": SHARED | {"density": [0.001, 0.5, 0.0]},
    "ties sum lambda": SHARED | {"density": DENSITIES, "normalize": False, "lambda": 1.7},
    "ties rescale": SHARED | {"density": DENSITIES, "rescale": True},
    "ties int8_mask": SHARED | {"density": [0.5] * 3, "int8_mask": True},
    "dare_linear": SHARED | {"density": DENSITIES},
    "dare_linear normalize lambda": SHARED
    | {"density": DENSITIES, "normalize": True, "lambda": 0.5},
    "dare_linear unscaled": SHARED | {"density": DENSITIES, "rescale": False},
    "dare_ties": SHARED | {"density": DENSITIES},
    "dare_ties normalize": SHARED | {"density": [0.5] * 3, "normalize": True, "lambda": 0.9},
}


def main() -> None:
    import torch
    from mergekit.merge_methods.base import TensorGroup
    from mergekit.merge_methods.registry import registered_methods

    methods = {method.spec.name: method for method in registered_methods()}
    rng = np.random.default_rng(7)
    arrays = {"cases": np.array(json.dumps(CASES))}
    base = rng.standard_normal(SHAPE).astype(np.float32)
    models = base + 0.1 * rng.standard_normal((3, *SHAPE)).astype(np.float32)
    models[1, ..., :5] = base[..., :5]
    arrays |= {"base": base, "models": models}
    masks = [rng.random(SHAPE) < density for density in DENSITIES]
    arrays["masks"] = np.stack(masks)
    for name, parameters in CASES.items():
        method = methods[name.split()[0]]
        defaults = {"normalize": method.default_normalize, "rescale": method.default_rescale}
        parameters = defaults | {"int8_mask": False} | parameters
        for key in ("weight", "density"):
            parameters[key] = dict(enumerate(parameters[key]))
        chosen = zip(masks, parameters["density"].values(), strict=True)
        draws = [mask for mask, density in chosen if density < 1]
        torch.bernoulli = lambda chances, d=draws: torch.from_numpy(d.pop(0)).to(chances.dtype)
        group = TensorGroup.from_tensors(
            [*map(torch.from_numpy, models), torch.from_numpy(base)], base_index=3
        )
        arrays[name] = method.merge_group(group, **parameters).numpy()
    np.savez_compressed(Path(__file__).with_name("mergekit_reference.npz"), **arrays)


if __name__ == "__main__":
    main()
