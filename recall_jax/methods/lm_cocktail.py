"""Merge by LM-Cocktail: one weight for each model, from its loss on a few labelled examples."""

from dataclasses import asdict, dataclass

import numpy as np

from recall_jax.engine.findings import Findings
from recall_jax.engine.merge import Merge, Prepared, weights_by_unit
from recall_jax.engine.needs import Needs, Observation
from recall_jax.methods.average import average
from recall_jax.methods.method import Method
from recall_jax.methods.parameters import Parameters, Positive
from recall_jax.methods.weights import layer_weights


class CocktailParameters(Parameters):
    """Hold the parameters of `lm_cocktail`: the temperature in nats of the softmax over losses."""

    temperature: Positive = 5.0


@dataclass(frozen=True)
class Losses:
    """Record in the journal a digest of the rows, their batching, and the losses so far in nats."""

    digest: str
    batching: dict[str, int]
    losses: list[float]


def prepare(merge: Merge[CocktailParameters, Parameters]) -> Prepared:
    """Return the rule of weights softmax(-loss / temperature), after running each model once.

    Xiao et al. 2023 (arXiv:2311.13534). The examples are `count` rows drawn from the data with its
    seed, or the given rows. Raises UnfinishedError if the memory is too small, or an interrupted
    merge used other texts.
    """
    from recall_jax.engine.batching import Batching, fit_batching
    from recall_jax.engine.budget import widest
    from recall_jax.engine.inputs import (
        TypicalSamples,
        check_same_texts,
        model_tokenizer,
        read_samples,
    )
    from recall_jax.engine.labels import label_tokens
    from recall_jax.engine.losses import mean_loss
    from recall_jax.engine.memory import loss_bytes

    walk, journal, settings = merge.checkpoints, merge.journal, merge.samples
    assert settings is not None
    models, arch, dtype = walk.inputs.models, walk.arch, walk.dtype
    newest = walk.inputs.newest
    with merge.progress.stage("select"):
        drawn = settings.model_copy(update={"pool": settings.count})
        samples = read_samples(
            drawn,
            newest,
            models,
            arch,
            ignore_tokenizers=merge.tokenizers_pass,
            budget=walk.budget,
        )
        tokenizer = model_tokenizer(newest, models, arch)
        token_ids, counted = label_tokens(samples, settings, newest, tokenizer)
        line = f"losses: {len(token_ids)} examples in a pass over each of the models"
        merge.progress.announce(line)
        found = journal.find_prepared(Losses)
        if found is None:
            batching = fit_batching(
                arch,
                list(map(len, token_ids)),
                num_models=1,
                batch_size=settings.batch_size,
                itemsize=np.dtype(dtype).itemsize,
                stored_itemsize=max(widest(model.specs) for model in models),
                budget=walk.budget,
                overhead=walk.overhead + loss_bytes(arch, settings.batch_size),
            )
            found = Losses(samples.digest(), asdict(batching), [])
        else:
            check_same_texts(found.digest, samples, newest.name)
        batching = Batching(**found.batching)  # other batches would be rounded differently
        for done in range(len(found.losses), len(models)):
            model = models[done]
            merge.progress(f"{model.name}: loss", done, len(models), read=model.bytes_read)
            loss = mean_loss(
                model, arch, token_ids, counted, batch_size=batching.batch_size, dtype=dtype
            )
            found = Losses(found.digest, found.batching, [*found.losses, loss])
            journal.record_prepared(found)
    losses = np.asarray(found.losses, np.float64)
    weights = layer_weights(-losses, temperature=merge.parameters.temperature)
    by_unit = np.repeat(np.asarray(weights)[:, None], len(walk.units), axis=1)
    return Prepared(
        weights_by_unit(Findings(by_unit, losses=losses), walk.specs),
        batching.needed_bytes,
        batching={"batch_size": batching.batch_size},
        compute_dtype=np.dtype(dtype).name,
        samples=TypicalSamples(samples, None, 0),
    )


METHOD = Method(
    lambda parameters: average,
    parameters=CocktailParameters,
    needs=Needs(
        models=2, samples="newest", labelled=True, observes=frozenset({Observation.LOGITS})
    ),
    prepare=prepare,
    equation="θ = Σₖ wₖ θₖ, w = softmax(−loss / T)",
)
