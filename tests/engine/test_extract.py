"""Extraction reads what the hidden states depend on, and nothing else."""

import numpy as np

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.engine.extract import pooled_states
from recall_jax.models.config import read_architecture


def test_the_output_projection_is_not_read(toys):
    model = open_checkpoint(toys.qwen2[0])
    arch = read_architecture(model.config)
    states, passes = pooled_states(
        model, arch, [[3, 4, 5], [6, 7]], arch.units, batch_size=2, dtype=np.float32
    )
    assert states.shape == (len(arch.units), 2, arch.hidden_size) and passes == 1
    assert not arch.tie_word_embeddings
    assert model.bytes_read == model.nbytes - model.specs["lm_head.weight"].nbytes
