"""LM-Cocktail: one weight for each model, by its loss on a few labelled examples."""

from dataclasses import asdict

import numpy as np

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.engine.budget import widest
from recall_jax.engine.cut import Cut, cut_forward
from recall_jax.engine.findings import Findings
from recall_jax.engine.inputs import (
    TypicalSamples,
    check_same_texts,
    common_architecture,
    compute_dtype,
    read_samples,
    tokenizer_of,
)
from recall_jax.engine.losses import mean_loss
from recall_jax.engine.memory import loss_bytes
from recall_jax.engine.rules import Merge, Prepared, weights_by_unit
from recall_jax.errors import InputError
from recall_jax.generation.end_of_text import end_of_text
from recall_jax.inputs.parts import row_parts, tokenize_parts
from recall_jax.inputs.samples import Tokenized
from recall_jax.inputs.settings import Samples
from recall_jax.inputs.tokens import Tokenizer
from recall_jax.methods.parameters import CocktailParameters
from recall_jax.methods.weights import layer_weights
from recall_jax.recipes.recipe import Recipe


def prepare_cocktail(merge: Merge) -> Prepared:
    """Weigh the models by softmax(-loss / temperature), each run once before the walk.

    Xiao et al. 2023 (arXiv 2311.13534). The examples are `count` rows drawn from the data by its
    seed, or the rows as given. Raises UnfinishedError where the memory is too small, or an
    interrupted merge saw other texts.
    """
    recipe, models, journal = merge.recipe, merge.models, merge.journal
    assert isinstance(recipe.parameters, CocktailParameters)
    assert recipe.samples is not None
    settings, newest = recipe.samples, models[-1]
    check_labelled(recipe)
    arch = common_architecture(models, recipe.ignore_config)
    dtype = compute_dtype(recipe.compute_dtype, newest)
    with merge.clock.stage("select"):
        drawn = settings.model_copy(update={"pool": settings.count})
        samples = read_samples(
            drawn,
            newest,
            models,
            arch,
            ignore_tokenizers=merge.tokenizers_pass,
            budget=merge.budget,
        )
        tokenizer = tokenizer_of(newest, models, arch)
        token_ids, counted = labelled(samples, settings, newest, tokenizer)
        merge.announce(f"losses: {len(token_ids)} examples in a pass over each of the models")
        prepared = journal.prepared
        if prepared is None:
            cut = cut_forward(
                arch,
                list(map(len, token_ids)),
                num_models=1,
                batch_size=settings.batch_size,
                itemsize=np.dtype(dtype).itemsize,
                stored=max(widest(model.specs) for model in models),
                budget=merge.budget,
                beside=merge.beside + loss_bytes(arch, settings.batch_size),
            )
            prepared = {"texts": samples.digest(), "cut": asdict(cut), "losses": []}
        else:
            check_same_texts(prepared["texts"], samples, newest.name)
        cut = Cut(**prepared["cut"])  # other batches would round otherwise
        for done, model in enumerate(models[len(prepared["losses"]) :], len(prepared["losses"])):
            merge.progress(f"{model.name}: loss", done, len(models), read=model.bytes_read)
            loss = mean_loss(
                model, arch, token_ids, counted, batch_size=cut.batch_size, dtype=dtype
            )
            prepared = {**prepared, "losses": [*prepared["losses"], loss]}
            journal.record_prepared(prepared)
    losses = np.asarray(prepared["losses"], np.float64)
    weights = layer_weights(-losses, temperature=recipe.parameters.temperature)
    units = list(merge.plan.units)
    by_unit = np.repeat(np.asarray(weights)[:, None], len(units), axis=1)
    return Prepared(
        weights_by_unit(Findings(by_unit, losses=losses), units),
        models,
        needed=cut.needed,
        cut={"batch_size": cut.batch_size},
        compute_dtype=np.dtype(dtype).name,
        samples=TypicalSamples(samples, None, 0),
    )


def check_labelled(recipe: Recipe) -> None:
    """Raise InputError where the samples are drawn, so that nobody has labelled them."""
    if recipe.samples is not None and recipe.samples.source != "data":
        raise InputError(
            f"samples.source {recipe.samples.source}: lm_cocktail weighs by labelled examples: "
            "give data or typical"
        )


def labelled(
    samples: Tokenized, settings: Samples, model: Checkpoint, tokenizer: Tokenizer
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of each row, and 1 on those that are predicted: its label, and the end of text.

    Raises InputError for a row without a label within `max_tokens`.
    """
    end = end_of_text(model)[0]
    token_ids, counted = [], []
    for index, row in zip(samples.indices, samples.rows, strict=True):
        where = f"{settings.data or settings.typical}, row {index} (from 0)"
        parts = row_parts(row, where, tokenizer, settings.fields)
        ids, counts = tokenize_parts(parts, tokenizer, where, end, settings.max_tokens)
        token_ids.append(ids)
        counted.append(counts)
        if not any(counted[-1][1:]):
            raise InputError(
                f"{where} has no token to predict within {settings.max_tokens} tokens: remove it, "
                "or allow more with samples.max_tokens"
            )
    return token_ids, counted
