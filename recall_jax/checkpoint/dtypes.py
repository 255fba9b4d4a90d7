"""List the element types of tensors by their names in files and in recipes."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

# The element types we read and write, by their names in a safetensors header.
DTYPE_OF_NAME: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
NAME_OF_DTYPE: Mapping[np.dtype[Any], str] = {dtype: name for name, dtype in DTYPE_OF_NAME.items()}
# By the names that numpy, torch and Flax use.
DTYPE_OF_LONG_NAME = {dtype.name: dtype for dtype in NAME_OF_DTYPE}
# The dtypes that an output may have, and that models may be run in.
DTYPES = {name: DTYPE_OF_LONG_NAME[name] for name in ("bfloat16", "float16", "float32", "float64")}


def is_float(dtype: np.dtype[Any]) -> bool:
    """Return whether a dtype is floating point, of any width: such elements can be averaged."""
    if dtype.kind != "V":  # a dtype of numpy, or a registered one of ml_dtypes
        return dtype.kind == "f"
    try:
        ml_dtypes.finfo(dtype)
    except ValueError:
        return False
    return True
