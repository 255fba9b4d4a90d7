"""Make the demo's models and data.

Run it as `python -m recall_jax.experiments.demo.train [--out DIR] [--seed N]`.

The base, half a million parameters in Qwen2 format, is trained from scratch on all five tasks, but
only on strings of 4 to 6 letters; on 4 to 8 letters about half of its answers are right. Three
fine-tunes start from it. Each trains all parameters on 1024 rows of one task, 4 to 8 letters, until
it has learned that task, and meanwhile forgets much of the others; two tasks are never trained
again. The loss is the mean cross-entropy of the tokens of the answer and of the end of text;
prompts do not count. The optimiser is AdamW on a cosine schedule.

Training is in float32; the weights are rounded to bfloat16 when saved, the dtype in which models
are published today, at half the size. On one machine a seed always gives the same bytes; another
CPU may round differently. It takes a few minutes on two cores.

The set-up was changed after the first merges. A learning rate of 5e-4 made fine-tunes that forgot
nearly everything else, and poor merges; the rate was then lowered to the lowest tried at which each
fine-tune masters its task. The criterion was the scores of the base and the fine-tunes, not of any
merge, and neither tasks nor samples were changed for one.
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from recall_jax.evaluation.strings import LENGTHS, StringRow, draw_distinct, draw_exercises
from recall_jax.experiments.demo import material
from recall_jax.experiments.demo.material import TASKS
from recall_jax.experiments.suites import scratch
from recall_jax.experiments.suites.scratch import BYTES, END
from recall_jax.files.output import output_folder
from recall_jax.inputs.tokens import QWEN2_PIECES
from recall_jax.models.architecture import Architecture
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import from_flax
from recall_jax.models.forward import forward, init_params, logits

TASK_TOKENS = tuple(f"{task} " for task in TASKS)
VOCABULARY = (*BYTES, END, *TASK_TOKENS)
"""A task's name and the space after it are one token; every other byte is a token."""

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "dtype": "bfloat16",
    "vocab_size": len(VOCABULARY),
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": VOCABULARY.index(END),
    "eos_token_id": VOCABULARY.index(END),
    "pad_token_id": VOCABULARY.index(END),
}

BASE_LENGTHS = range(4, 7)
BASE_STEPS = 600
BASE_BATCH_SIZE = 128
BASE_LEARNING_RATE = 2e-3
FINE_TUNING_ROWS = 1024
FINE_TUNING_EPOCHS = 12
FINE_TUNING_BATCH_SIZE = 64
FINE_TUNING_LEARNING_RATE = 1e-4
TEST_ROWS = 128
WARMUP = 0.1  # fraction of all steps; the cosine ends at the same fraction of the peak rate
ADAM_B2 = 0.98
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0

LONGEST = 1 + LENGTHS[-1] + 1 + LENGTHS[-1] + 1
"""The number of tokens of the longest row: task, letters, "=", answer, end of text."""

Params = dict[str, Any]


class DemoBatch(NamedTuple):
    """Hold right-padded rows, (B, T) int32 each; `is_answer` is 1 on the tokens that count."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    is_answer: np.ndarray


def make_demo_tokenizer() -> Tokenizer:
    """Make a tokenizer like Qwen2's, byte-level BPE, without merges.

    Whatever class its files name, transformers rebuilds the tokenizer of a Qwen2 model with this
    normalizer, these pieces and this decoder, so tokenizer.json must have them too.
    """
    ids = {token: index for index, token in enumerate(BYTES)}
    tokenizer = Tokenizer(models.BPE(ids, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in TASK_TOKENS])
    return tokenizer


def make_demo_batch(tokenizer: Tokenizer, rows: Sequence[StringRow]) -> DemoBatch:
    """Make a batch of rows, with the end of text after completions, padded to `LONGEST` tokens."""
    batch = DemoBatch(*(np.zeros((len(rows), LONGEST), np.int32) for _ in DemoBatch._fields))
    end = tokenizer.token_to_id(END)
    for index, row in enumerate(rows):
        prompt = tokenizer.encode(row["prompt"]).ids
        ids = [*prompt, *tokenizer.encode(row["completion"]).ids, end]
        batch.input_ids[index, : len(ids)] = ids
        batch.attention_mask[index, : len(ids)] = 1
        batch.is_answer[index, len(prompt) : len(ids)] = 1
    return batch


def make_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Return AdamW with clipped gradients, linear warm-up and cosine decay over `steps`."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, int(WARMUP * steps)), steps, WARMUP * learning_rate
    )
    adamw = optax.adamw(
        lambda step: schedule(jnp.float32(step)), b2=ADAM_B2, weight_decay=WEIGHT_DECAY
    )
    return optax.chain(optax.clip_by_global_norm(CLIP_NORM), adamw)


def answer_loss(arch: Architecture, params: Params, batch: DemoBatch) -> jax.Array:
    """Return the mean cross-entropy of the answers' tokens, float32 ()."""
    input_ids, attention_mask, is_answer = map(jnp.asarray, batch)
    _, normed = forward(arch, params, input_ids, attention_mask, observe=lambda _: ())
    scores = logits(arch, params, normed)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, input_ids[:, 1:])
    weights = is_answer[:, 1:].astype(jnp.float32)
    return jnp.sum(losses * weights) / jnp.sum(weights)


@partial(jax.jit, static_argnames=("arch", "optimizer"))
def _step(
    arch: Architecture,
    optimizer: optax.GradientTransformation,
    params: Params,
    state: optax.OptState,
    batch: DemoBatch,
) -> tuple[Params, optax.OptState, jax.Array]:
    loss, gradients = jax.value_and_grad(answer_loss, argnums=1)(arch, params, batch)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


def train_model(
    arch: Architecture,
    optimizer: optax.GradientTransformation,
    params: Params,
    batches: Iterable[DemoBatch],
) -> tuple[Params, list[float]]:
    """Make a step for each batch; return the parameters and the loss before each step."""
    state = optimizer.init(params)
    losses = []
    for batch in batches:
        params, state, loss = _step(arch, optimizer, params, state, batch)
        losses.append(loss)
    return params, [float(loss) for loss in losses]


def base_batches(tokenizer: Tokenizer, seed: int) -> Iterator[DemoBatch]:
    """Yield a batch of new short rows of all tasks for every step."""
    rows = draw_exercises(tuple(TASKS), seed, lengths=BASE_LENGTHS)
    for _ in range(BASE_STEPS):
        yield make_demo_batch(tokenizer, list(islice(rows, BASE_BATCH_SIZE)))


def fine_tuning_batches(
    tokenizer: Tokenizer, rows: Sequence[StringRow], seed: int
) -> Iterator[DemoBatch]:
    """Yield batches of the same rows, shuffled in every epoch."""
    rng = random.Random(seed)
    for _ in range(FINE_TUNING_EPOCHS):
        shuffled = rng.sample(rows, len(rows))
        for start in range(0, len(rows), FINE_TUNING_BATCH_SIZE):
            yield make_demo_batch(tokenizer, shuffled[start : start + FINE_TUNING_BATCH_SIZE])


def save_demo_model(folder: Path, arch: Architecture, params: Params, tokenizer: Tokenizer) -> None:
    """Write a model folder as transformers does, with weights in bfloat16."""
    scratch.save_model(folder, CONFIG, from_flax(arch, params), tokenizer, ml_dtypes.bfloat16)


def save_data(folder: Path, seed: int) -> None:
    """Write the rows of every fine-tune and held-out rows of every task."""
    for task in material.FINE_TUNED:
        rows = draw_distinct(task, FINE_TUNING_ROWS, seed)
        _write_rows(material.training_file(task, folder), rows)
    for task in TASKS:
        rows = draw_distinct(task, TEST_ROWS, seed, held_out=True)
        _write_rows(material.held_out_file(task, folder), rows)


def make_material(checkpoints: Path, data: Path, seed: int) -> None:
    """Make the data and the models, and write them into two empty folders."""
    save_data(data, seed)
    tokenizer, arch = make_demo_tokenizer(), read_architecture(CONFIG)

    def save(model: str, params: Params, losses: Sequence[float]) -> None:
        save_demo_model(checkpoints / model, arch, params, tokenizer)
        print(f"{model}: {len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}", flush=True)

    start = init_params(arch, jax.random.key(seed))
    optimizer = make_optimizer(BASE_LEARNING_RATE, BASE_STEPS)
    base, losses = train_model(arch, optimizer, start, base_batches(tokenizer, seed))
    save(material.BASE, base, losses)

    steps = FINE_TUNING_EPOCHS * FINE_TUNING_ROWS // FINE_TUNING_BATCH_SIZE
    optimizer = make_optimizer(FINE_TUNING_LEARNING_RATE, steps)
    for task in material.FINE_TUNED:
        rows = draw_distinct(task, FINE_TUNING_ROWS, seed)
        save(task, *train_model(arch, optimizer, base, fine_tuning_batches(tokenizer, rows, seed)))


def _write_rows(path: Path, rows: Iterable[StringRow]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and make the material."""
    parser = argparse.ArgumentParser(
        prog="python -m recall_jax.experiments.demo.train", description=__doc__
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="where to put `checkpoints` and `data`; by default they replace the package's",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    in_package = options.out is None
    out = material.CHECKPOINTS.parent if in_package else options.out
    with (
        output_folder(out / material.CHECKPOINTS.name, force=in_package) as checkpoints,
        output_folder(out / material.DATA.name, force=in_package) as data,
    ):
        make_material(checkpoints, data, options.seed)


if __name__ == "__main__":
    main()
