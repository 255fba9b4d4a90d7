"""Check the settings of a fine-tuning."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from recall_jax.checkpoint.dtypes import DTYPES
from recall_jax.errors import InputError
from recall_jax.inputs.shapes import Fields
from recall_jax.models.lora import LoraSpec
from recall_jax.training.optimizer import SCHEDULES

METHODS = ("full", "lora", "ewc")
_AT_LEAST = {
    "max_tokens": 2,
    "epochs": 1,
    "steps": 1,
    "batch_size": 1,
    "accumulate": 1,
    "patience": 1,
    "evaluate_every": 1,
    "save_every": 0,
    "seed": 0,
    "weight_decay": 0,
    "ewc_samples": 1,
}
_ABOVE_0 = ("learning_rate", "clip_norm", "ewc_strength", "ewc_decay")


@dataclass(frozen=True)
class TrainingSettings:
    """Hold the settings of a fine-tuning, named as the options of `recall finetune`.

    `steps` takes precedence over `epochs`. `evaluate_every` and `save_every` are numbers of steps:
    None evaluates once an epoch, 0 never saves. `learning_rate` is the peak of the schedule, and
    `warmup` the fraction of the steps in which it rises. `mesh` is written as
    `data=2,fsdp=2,tensor=2`. `ewc_fisher` are files that earlier runs wrote by `save_fisher`;
    `ewc_data` are data files whose Fisher information is computed in the base model. `ewc_decay`
    combines these anchors into one, as `training.ewc.online` does.

    Raises InputError for a value out of range, or settings that exclude each other.
    """

    data: str
    method: str = "full"
    validation: str | None = None
    validation_share: float | None = None
    field: str | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    max_tokens: int = 512
    epochs: int = 3
    steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 2e-5
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0
    patience: int | None = None
    evaluate_every: int | None = None
    save_every: int = 500
    compute_dtype: str | None = None
    out_dtype: str | None = None
    remat: bool = False
    mesh: str = "data=1"
    lora: LoraSpec | None = None
    ewc_fisher: tuple[str, ...] = ()
    ewc_data: tuple[str, ...] = ()
    ewc_strength: float | None = None
    ewc_decay: float | None = None
    ewc_samples: int = 256
    save_fisher: bool = False
    ignore_config: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check all settings; InputError names the setting at fault."""
        _choice("finetune.method", self.method, METHODS)
        _choice("finetune.schedule", self.schedule, SCHEDULES)
        if self.out_dtype is not None:
            _choice("finetune.out_dtype", self.out_dtype, DTYPES)
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise InputError(f"finetune.{name} {value}: it must be at least {least}")
        for name in _ABOVE_0:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"finetune.{name} {value}: it must be above 0")
        if self.seed >= 2**32:
            raise InputError(f"finetune.seed {self.seed}: it must be below 2^32")
        if not 0 <= self.warmup <= 1:
            raise InputError(
                f"finetune.warmup {self.warmup}: it is a share of the steps, from 0 to 1"
            )
        if self.field is not None and self.fields.names_pair:
            raise InputError(
                "finetune.field and finetune.prompt_field, finetune.completion_field: give one or "
                "the other"
            )
        self._check_validation()
        self._check_method()

    @property
    def fields(self) -> Fields:
        """Return the fields of a row that hold its text."""
        return Fields(self.field, self.prompt_field, self.completion_field)

    @property
    def validates(self) -> bool:
        """Return whether there are rows to validate on."""
        return self.validation is not None or self.validation_share is not None

    @property
    def data_files(self) -> tuple[str, ...]:
        """Return all files that are read, except those of the model."""
        files = (self.data, self.validation, *self.ewc_fisher, *self.ewc_data)
        return tuple(file for file in files if file is not None)

    def _check_validation(self) -> None:
        share = self.validation_share
        if share is not None and not 0 < share < 1:
            raise InputError(f"finetune.validation_share {share}: it must be between 0 and 1")
        if self.validation is not None and share is not None:
            raise InputError("finetune.validation and finetune.validation_share: give one of them")
        if (self.patience or self.evaluate_every) and not self.validates:
            raise InputError(
                "finetune.patience and finetune.evaluate_every need rows to validate on: give "
                "finetune.validation FILE or finetune.validation_share"
            )

    def _check_method(self) -> None:
        if (self.lora is not None) != (self.method == "lora"):
            raise InputError("LoRA's options go with finetune.method lora, and with nothing else")
        if self.method == "lora" and (self.out_dtype or self.save_fisher):
            raise InputError(
                "finetune.out_dtype and finetune.save_fisher are for models, not for adapters"
            )
        if self.ewc_decay is not None and not (self.method == "ewc" and self.ewc_decay <= 1):
            raise InputError(
                f"finetune.ewc_decay {self.ewc_decay}: with finetune.method ewc, at most 1"
            )
        consolidates = bool(self.ewc_fisher or self.ewc_data)
        if consolidates != (self.method == "ewc") or (self.ewc_strength is None) == consolidates:
            raise InputError(
                "finetune.method ewc needs finetune.ewc_strength and finetune.ewc_fisher FILE or "
                "finetune.ewc_data FILE; they are for nothing else"
            )


def lora_spec(method: str, **given: Any) -> LoraSpec | None:
    """Return the settings of LoRA if the method is lora or any is given; None is the default."""
    chosen = {name: value for name, value in given.items() if value is not None}
    return LoraSpec(**chosen) if chosen or method == "lora" else None


def _choice(setting: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise InputError(f"{setting} {value}: use {', '.join(choices)}")
