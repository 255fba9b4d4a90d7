"""Strategies by name, as `recall continual` takes them; a recipe can begin from one with `like`.

The numbers are those of each method's paper or of its authors' code; where those choose by
validation, what TIES' authors advise without it. Experts are fine-tuned from the base and merged
all at once, unless a line says otherwise.
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
        "about": "One fine-tuning after the other, held back by the Fisher information of each "
        "earlier task (Kirkpatrick et al. 2017).",
        "finetune": {"method": "ewc", "ewc_strength": 100.0},
    },
    "average": {
        "about": "The average of the base and the experts (Wortsman et al. 2022).",
        "merge": {"merge_method": "average", "with_base": True},
    },
    "task_arithmetic": {
        "about": "The sum of the experts' task vectors, times 0.4 (Ilharco et al. 2023).",
        "merge": {
            "merge_method": "task_arithmetic",
            "parameters": {"weight": 1.0, "lambda": 0.4},
        },
    },
    "dare": {
        "about": "Task arithmetic after half of the elements are dropped at random and the others "
        "doubled (Yu et al. 2024, who choose the share by validation).",
        "merge": {
            "merge_method": "dare_linear",
            "parameters": {
                "weight": 1.0,
                "lambda": 0.4,
                "density": 0.5,
                "rescale": "density",
                "seed": "{seed}",
            },
        },
    },
    "ties": {
        "about": "The largest fifth of each task vector, elected by sign and averaged (Yadav et "
        "al. 2023).",
        "merge": {
            "merge_method": "ties",
            "parameters": {"weight": 1.0, "lambda": 1.0, "density": 0.2},
        },
    },
    "lm_cocktail": {
        "about": "The base and the experts, weighed by their losses on typical samples of the "
        "newest task (Xiao et al. 2023).",
        "merge": {"merge_method": "lm_cocktail", "with_base": True},
    },
    "magmax": {
        "about": "Experts fine-tuned one from the other; of their task vectors the largest "
        "elements, times 0.5 (Marczak et al. 2024).",
        "from": "expert",
        "merge": {"merge_method": "magmax", "parameters": {"lambda": 0.5}},
    },
    "opcm": {
        "about": "Task vectors added one after the other, each without what lies in the leading "
        "directions of those before (Tang et al. 2025).",
        "merge": {"merge_method": "opcm"},
    },
    "regmean": {
        "about": "Linear layers that answer as the experts do on typical samples of their own "
        "(Jin et al. 2023).",
        "merge": {"merge_method": "regmean"},
    },
    "regmean_plusplus": {
        "about": "RegMean, with what the merged layers below give as its inputs (Nguyen et al. "
        "2025).",
        "merge": {"merge_method": "regmean_plusplus"},
    },
    "recall": {
        "about": "RECALL: the base and the experts, weighed in each layer by how alike their "
        "representations of the newest task's typical samples are (arXiv:2510.20479).",
        "merge": {"merge_method": "recall", "with_base": True},
    },
    "recall_distill": {
        "about": "RECALL's weights refined until the merged model answers as each expert does on "
        "its own typical samples, and as the base does on samples drawn from it.",
        "merge": {"merge_method": "recall_distill"},
    },
    "recall_sequential": {
        "about": "RECALL of two: each expert fine-tuned from the last merged model, and merged "
        "with it.",
        "from": "merged",
        "keeps": "merged",
        "merge": {"merge_method": "recall", "with_base": True},
    },
    "joint": {
        "about": "One fine-tuning on the rows of all tasks, which no sequence has: an upper bound.",
        "joint": True,
    },
}
