"""Where two files differ, and how: arrays, JSON, texts."""

import json
import re
from collections.abc import Iterator
from html import unescape
from itertools import zip_longest
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

# Keys of JSON files that tell of the run and the machine.
OF_THE_RUN = {
    "timing_s": "durations",
    "seconds": "a duration",
    "tokens_per_second": "a duration",
    "peak_memory_bytes": "also of what else was loaded",
    "memory": "a share of what was free",
    "run": "drawn, so that parts of two runs are not mixed",
}
# The same in texts, and what stands for it; and what pages bring with them.
IN_TEXTS = {
    r"\b[\d.,]+ (µs|ms|s|min|h)\b( \d+ (s|min)\b)?": "TIME",
    r"\b[\d.,]+ tokens/s": "SPEED",
    r"\b[\d.,]+ [kMG]B of memory": "MEMORY",
    r"(peak memory</(dt|th)><(dd|td)>)[^<]+": r"\1MEMORY",
    r"(?s)<(script|style)>.*?</\1>|'sha256-[^']+'": "ASSET",
    r"(recall_(<wbr>)?jax/(<wbr>)?)experiments/(<wbr>)?demo/": r"\1demo/",  # moved in the package
}
DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8"}


def differences(before: Path, after: Path) -> Iterator[str]:
    """Yield where two files differ, and how."""
    for path, other in (before, after), (after, before):
        if not path.exists():
            yield f"only in {other.parent}"
            return
    if before.is_dir() or before.suffix in (".safetensors", ".npz"):
        yield from differences_of_arrays(read_arrays(before), read_arrays(after))
    elif before.read_bytes() == after.read_bytes():
        return
    elif before.suffix == ".json":
        values = [json.loads(path.read_text()) for path in (before, after)]
        if before.name in ("checksums.json", "part.json"):
            leave_out_changed(values, before.parent, after.parent)
        first, second = (dict(leaves(value)) for value in values)
        for key in dict.fromkeys([*first, *second]):
            if first.get(key) != second.get(key):
                yield f"{key}: {first.get(key)} became {second.get(key)}"
    else:
        try:
            texts = [plain(path.read_text()) for path in (before, after)]
        except UnicodeDecodeError:
            yield "bytes differ"
            return
        counted, recounted = (re.findall(r"\d+(?:\.\d+)?", text) for text in texts)
        prose = counted == recounted and before.suffix in (".html", ".md", ".said")
        lines = zip_longest(*(text.splitlines() for text in texts))
        for number, (line, now) in enumerate(lines, 1):
            if line != now:
                where = f"line {number}{', words alone' if prose else ''}"
                yield f"{where}: {line} became {now}"


def leave_out_changed(checksums: list[Any], *folders: Path) -> None:
    """Remove the entries of files whose bytes are not the same, which is told of them."""
    for name in {name for each in checksums for name in each["files"]}:
        paths = [folder / name for folder in folders]
        if not all(p.exists() for p in paths) or len({p.read_bytes() for p in paths}) > 1:
            for each in checksums:
                each["files"].pop(name, None)


def plain(text: str) -> str:
    """Replace what tells of the run and the machine, and entities of HTML."""
    text = unescape(text)
    for pattern, instead in IN_TEXTS.items():
        text = re.sub(pattern, instead, text)
    return text


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of a JSON file by their paths, as text, without those of the run."""
    if isinstance(value, dict | list) and value:
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            if name not in OF_THE_RUN:
                yield from leaves(part, f"{key}.{name}" if key else str(name))
    else:
        yield key, plain(json.dumps(value))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    if path.is_dir():
        import jax
        from orbax.checkpoint import v1 as ocp

        shapes = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), ocp.metadata(path).metadata)
        tree = ocp.load(path.absolute(), shapes)  # as numpy arrays, whatever wrote them
        return {jax.tree_util.keystr(k): leaf for k, leaf in jax.tree.leaves_with_path(tree)}
    return read_npz(path) if path.suffix == ".npz" else read_safetensors(path)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a file; numpy knows no bfloat16, and gives two bytes."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    return {n: a.view(ml_dtypes.bfloat16) if a.dtype == "V2" else a for n, a in arrays.items()}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    arrays = {}
    for name, each in header.items():
        first, end = each["data_offsets"]
        flat = np.frombuffer(content[start + first : start + end], DTYPES[each["dtype"]])
        arrays[name] = flat.reshape(each["shape"])
    return arrays


def differences_of_arrays(
    before: dict[str, np.ndarray], after: dict[str, np.ndarray]
) -> Iterator[str]:
    for name in dict.fromkeys([*before, *after]):
        a, b = before.get(name), after.get(name)
        if a is None or b is None:
            yield f"{name}: only {'after' if a is None else 'before'}"
        elif (a.dtype, a.shape) != (b.dtype, b.shape):
            yield f"{name}: {a.dtype} {a.shape} became {b.dtype} {b.shape}"
        elif a.tobytes() != b.tobytes():
            yield f"{name}: {np.sum(a != b)} of {a.size} differ, by up to {ulps(a, b):,} ulp"


def ulps(a: np.ndarray, b: np.ndarray) -> int:
    """Return the largest distance of two arrays, in units in the last place."""
    places = []
    for array in (a, b):
        bits = array.view(f"i{array.itemsize}").astype(object)
        places.append(np.where(bits < 0, -(bits & (2 ** (8 * array.itemsize - 1) - 1)), bits))
    return int(np.abs(places[0] - places[1]).max())
