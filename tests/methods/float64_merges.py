"""The merge methods once more: in float64 numpy, element by element, from their equations."""

import numpy as np


def vectors_of(models, base):
    return [np.asarray(model, np.float64) - np.asarray(base, np.float64) for model in models]


def combined(vectors, weights, *, normalize, consensus):
    merged = np.zeros(vectors[0].shape)
    for at in np.ndindex(merged.shape):
        parts = [w * vector[at] for w, vector in zip(weights, vectors, strict=True)]
        sign = 1 if sum(parts) >= 0 else -1
        taken = [not consensus or np.sign(part) == sign for part in parts]
        number = sum(part for part, mask in zip(parts, taken, strict=True) if mask)
        divisor = sum(w for w, mask in zip(weights, taken, strict=True) if mask)
        merged[at] = number / (divisor if abs(divisor) > 1e-9 else 1) if normalize else number
    return merged


def largest(vector, density):
    if density >= 1:
        return vector
    if density <= 0:
        return np.zeros_like(vector)
    count = max(1, int(density * vector.size + 1e-9))
    smallest = np.sort(np.abs(vector).ravel())[-count]
    return np.where(np.abs(vector) >= smallest, vector, 0)


def task_arithmetic(models, base, weights, lambda_=1.0, normalize=False):
    vectors = vectors_of(models, base)
    return base + lambda_ * combined(vectors, weights, normalize=normalize, consensus=False)


def ties(models, base, weights, densities, lambda_=1.0, normalize=True, rescale=False):
    vectors = vectors_of(models, base)
    trimmed = [largest(v, d) for v, d in zip(vectors, densities, strict=True)]
    if rescale:
        trimmed = [
            t * (np.abs(v).sum() / np.abs(t).sum()) for t, v in zip(trimmed, vectors, strict=True)
        ]
    return base + lambda_ * combined(trimmed, weights, normalize=normalize, consensus=True)


def dare(models, base, weights, masks, lambda_, *, normalize, consensus, scales):
    vectors = vectors_of(models, base)
    sparse = [s * m * v for s, m, v in zip(scales, masks, vectors, strict=True)]
    return base + lambda_ * combined(sparse, weights, normalize=normalize, consensus=consensus)


def magmax(models, base, lambda_=1.0):
    vectors = np.stack(vectors_of(models, base))
    largest = np.abs(vectors) == np.abs(vectors).max(axis=0)
    return base + lambda_ * np.where(largest, vectors, -np.inf).max(axis=0)


def opcm(models, bases, alpha):
    """All tensors of K models in turn, as the authors have it: scaled at every step.

    `models` are K mappings of names to arrays; matrices are projected.
    """

    def norm(one):
        return np.sqrt(sum(((one[n] - bases[n]) ** 2).sum() for n in bases))

    merged, scale, norms = dict(models[0]), 1.0, [norm(models[0])]
    for model in models[1:]:
        norms.append(norm(model))
        new = {}
        for name, base in bases.items():
            before, vector = merged[name] - base, model[name] - base
            if base.ndim == 2:
                u, s, vh = np.linalg.svd(before, full_matrices=True)
                split = int((np.cumsum(s) / s.sum() > alpha).argmax())
                inside = u.T @ vector @ vh.T
                np.fill_diagonal(inside, 0)
                inside[:split, :split] = 0
                vector = u @ inside @ vh
            new[name] = base + scale * before + vector
        size = norm(new)
        merged = {n: b + (new[n] - b) * np.mean(norms) / size for n, b in bases.items()}
        scale = size / np.mean(norms)
    return merged, scale


def regmean(models, grams, alpha, weights):
    off = 1 - np.eye(grams.shape[1])
    grams = [w * g * (alpha * off + (1 - off)) for w, g in zip(weights, grams, strict=True)]
    right = sum(g @ np.asarray(m, np.float64).T for g, m in zip(grams, models, strict=True))
    return np.linalg.solve(sum(grams), right).T
