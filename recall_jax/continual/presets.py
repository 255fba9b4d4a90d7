"""Strategies by name, as `recall continual` takes them; a recipe can begin from one with `like`.

The numbers are those of each method's paper where it gives one for several tasks, and else said
here. Experts are fine-tuned from the base and merged all at once, unless a line says otherwise.
"""

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "sequential": {
        "about": "One fine-tuning after the other, of all weights.",
        "finetune": {"method": "full"},
    },
    "lora": {
        "about": "One LoRA fine-tuning after the other (Hu et al. 2021).",
        "finetune": {"method": "lora"},
    },
    "ewc": {
        "about": "Elastic weight consolidation, the Fisher information of each task kept "
        "(Kirkpatrick et al. 2017).",
        "finetune": {"method": "ewc", "ewc_strength": 1000.0},
    },
    "joint": {
        "about": "One fine-tuning on the rows of all tasks, which no sequence has: an upper bound.",
        "joint": True,
    },
    "average": {
        "about": "The average of the experts (Wortsman et al. 2022).",
        "merge": {"merge_method": "average"},
    },
    "recall": {
        "about": "RECALL: experts weighed in each layer by how alike their representations of the "
        "newest task are (arXiv:2510.20479).",
        "merge": {"merge_method": "recall"},
    },
}
