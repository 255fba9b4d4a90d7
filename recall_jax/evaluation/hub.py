"""Load rows from the Hugging Face hub, if `datasets` is installed."""

from typing import Any

from recall_jax.errors import InputError
from recall_jax.inputs.row_files import Row


def load_split(split: str, **source: Any) -> list[Row]:
    """Return the rows of one split of `datasets.load_dataset(**source)`.

    Raises InputError, one line, if `datasets` is not installed or cannot load them.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(
            "datasets, which would load it, is not installed (pip install 'recall-jax[hub]')"
        ) from None
    try:
        return list(datasets.load_dataset(**source, split=split))
    except Exception as error:  # offline, renamed or gated: the library raises many types
        raise InputError(f"datasets cannot load it ({' '.join(str(error).split())})") from error
