"""Define the settings of samples: where their rows come from, and how they are read."""

from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator

from recall_jax.errors import InputError
from recall_jax.files.schema import Schema, validate
from recall_jax.inputs.shapes import Fields

Count = Annotated[int, Strict(), Field(ge=1)]
FIELD_KEYS = ("field", "prompt_field", "completion_field")  # each names a field of the rows
TYPICAL = "typical.jsonl"  # in a merged folder, the typical samples of its models
UNNAMED = "give samples.data (rows to choose from) or samples.typical (rows as given)"


class Samples(Schema):
    """Configure the typical samples: from `data`, given as `typical`, or of another `source`.

    The other sources need no data: `generated` rows are written by the models, from `prompts` if
    given, and `random` rows consist of random tokens.
    """

    source: Literal["data", "generated", "random"] = "data"
    data: str | None = None
    typical: str | None = None
    prompts: str | None = None
    field: str | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    tokenizer: Annotated[str, Field(min_length=1)] | None = None
    count: Count = 20
    pool: Count = 1024
    max_tokens: Count = 512
    batch_size: Count = 8
    seed: Annotated[int, Strict(), Field(ge=0, lt=2**32)] = 0
    unit: Annotated[int, Strict()] | str = "last"

    @model_validator(mode="after")
    def _one_source(self) -> "Samples":
        if self.data is not None and self.typical is not None:
            raise ValueError(
                "give either samples.data (rows to choose from) or samples.typical (rows as given)"
            )
        names = ("data", "typical", *FIELD_KEYS)
        named = [key for key in names if getattr(self, key) is not None]
        if self.source != "data" and named:
            raise ValueError(f"source: {self.source} needs no data: remove {named[0]}")
        if self.field is not None and self.fields.names_pair:
            raise ValueError(
                "give either samples.field (of a text) or samples.prompt_field and "
                "samples.completion_field"
            )
        if self.source != "generated" and self.prompts is not None:
            raise ValueError("prompts are for source: generated: remove them")
        return self

    @property
    def fields(self) -> Fields:
        """Return the names of the fields that hold a row's text."""
        return Fields(self.field, self.prompt_field, self.completion_field)

    @property
    def are_named(self) -> bool:
        """Return whether the newest model's samples are specified, or need no specification."""
        return self.source != "data" or self.data is not None or self.typical is not None


def make_samples(values: dict[str, Any]) -> Samples:
    """Build the settings from only a recipe's `samples`; InputError if they are invalid."""
    samples = validate(Samples, values, "samples")
    if not samples.are_named:
        raise InputError(UNNAMED)
    return samples
