"""Register the families of decoders by `model_type`. A new one is a file here and a line below."""

from recall_jax.models.families.family import Family
from recall_jax.models.families.llama import LLAMA
from recall_jax.models.families.mistral import MISTRAL
from recall_jax.models.families.qwen2 import QWEN2
from recall_jax.models.families.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)
}
