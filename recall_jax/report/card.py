"""Write the model card of a merged folder, `README.md`: its models, the method, and its use."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import yaml

from recall_jax.report import wording
from recall_jax.report.markdown import bullet, code, plain, table

_MOST_UNITS = 40  # a table of weights with more rows shows means over thirds of the depth


def model_card(report: Mapping[str, Any], out_name: str, base_models: Sequence[str] = ()) -> str:
    """Return the Markdown of the card of folder `out_name`, for a valid report of a merge.

    `base_models` are the hub ids of the merged models, for the front matter. The caller provides
    them, because an id such as "org/model" cannot be distinguished from a folder by name.
    """
    library = "jax" if report.get("tree") else "transformers"
    parts = [_front_matter(library, base_models), *_models(report, out_name), *_method(report)]
    parts += _weights(report)
    if report["settings"]:
        settings = wording.flat_settings(report["settings"])
        rows = [[code(name), code(value)] for name, value in settings]
        parts += ["## Settings", table(["setting", "value"], rows)]
    if report["warnings"]:
        parts += ["## Warnings", "\n".join(map(bullet, report["warnings"]))]
    tree = report.get("tree")
    use = _USE if tree is None else _USE_OF_TREES[tree["format"]]
    parts += [
        "## Use",
        use.replace("NAME", json.dumps(out_name, ensure_ascii=False)),
        "## Repeat",
        "```sh\nrecall merge recall_recipe.yml OUT\n```",
        "`recall_recipe.yml` in this folder holds every setting, and where models and data lay.",
    ]
    return wording.printable("\n\n".join(parts) + "\n")


_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForCausalLM.from_pretrained(NAME)
inputs = tokenizer("Your text", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```"""


# A tree is loaded by the code that its models come from.
_USE_OF_TREES = {
    "orbax": """\
```python
from pathlib import Path
from orbax.checkpoint import v1 as ocp

params = ocp.load(Path(NAME, "tree").absolute())
```""",
    "npz": """\
```python
from pathlib import Path
import numpy as np

params = dict(np.load(Path(NAME, "tree.npz")))  # by path; V2 is bfloat16
```""",
    "msgpack": """\
`tree.msgpack` is of the format of the newest model's file: Flax's
(`flax.serialization.msgpack_restore`), or EasyLM's stream.""",
}


def _front_matter(library: str, base_models: Sequence[str]) -> str:
    fields: dict[str, Any] = {"library_name": library}
    fields["tags"] = ["merge", "recall", "recall_jax"]
    if base_models:
        fields["base_model"] = list(dict.fromkeys(base_models))
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _models(report: Mapping[str, Any], out_name: str) -> Iterator[str]:
    yield f"# {plain(out_name)}"
    count = len(report["models"])
    yield (
        f"A merge of {count} model{'s' if count > 1 else ''} by the method "
        f"{code(report['method'])}, made with recall_jax. "
        "`recall_report.html` shows it in pictures, `recall_report.json` holds every number."
    )
    yield "## Models"
    roles = wording.roles(report)
    rows = [
        [str(index + 1), code(name) + (f" ({role})" if role else "")]
        for index, (name, role) in enumerate(zip(report["models"], roles, strict=True))
    ]
    if base := report.get("base_model"):
        rows.append(["", f"{code(base)} (base)"])
    yield table(["no.", "model"], rows)


def _method(report: Mapping[str, Any]) -> Iterator[str]:
    if lines := wording.equation(report):
        yield "## Method"
        if report["similarity"] is not None:
            yield (
                "RECALL (arXiv 2510.20479): every model reads the same typical texts, and at each "
                "unit (the embedding, each layer, the head) a model counts the more, the more its "
                "hidden states resemble "
                + ("the others'." if report["reference"] is None else "the reference's.")
            )
        yield "```text\n" + "\n".join(lines) + "\n```"
    if given := report["settings"].get("weights"):
        yield f"The weights were taken from {code(str(given))}."
    if found := wording.depth_verdict(report):
        yield f"The newest model's weight rises with depth: **{found[0]}**. It is {found[1]}."


def _weights(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of weights: for every unit, over thirds of the depth, or one row for all."""
    weights, units = report["weights"], report["units"]
    if weights is None:
        return
    yield "## Weights"
    if not wording.varies(weights):
        groups = {"every unit": slice(None)}
    elif len(units) <= _MOST_UNITS:
        groups = {unit: slice(index, index + 1) for index, unit in enumerate(units)}
    else:
        yield "Means over thirds of the depth; every unit's weights are in the report."
        edges = [round(part * len(units) / 3) for part in range(4)]
        groups = {
            f"{units[start]} to {units[stop - 1]}": slice(start, stop)
            for start, stop in pairwise(edges)
        }
    rows = [
        [plain(name), *(wording.number(fmean(row[span])) for row in weights)]
        for name, span in groups.items()
    ]
    yield table(["unit", *(str(index + 1) for index in range(len(weights)))], rows)
