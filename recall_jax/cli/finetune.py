"""Define `recall finetune`: train a model on rows of text."""

from pathlib import Path
from typing import Annotated, Any

import typer

from recall_jax.cli import console
from recall_jax.cli import options as opt


def finetune(
    model: Annotated[str, typer.Argument(help="Model to start from: a folder or hub id.")],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            help="Rows to train on: .jsonl, .json, .csv, .txt (also .gz) or .parquet. The loss "
            "counts completions, the assistant's turns of messages, or all of a text.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; it must not exist.")],
    method: Annotated[
        str, typer.Option("--method", help="full, lora (an adapter) or ewc.")
    ] = "full",
    validation: Annotated[
        Path | None,
        typer.Option("--validation", help="Rows to validate on; the best weights are kept."),
    ] = None,
    validation_share: Annotated[
        float | None,
        typer.Option("--validation-share", help="Hold out this share of the data to validate on."),
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", help="Number of passes over the rows.")] = 3,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Number of steps, instead of epochs.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Rows in a batch, over all devices.")
    ] = 8,
    accumulate: Annotated[
        int, typer.Option("--accumulate", help="Batches whose gradients are summed in a step.")
    ] = 1,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", help="Peak of the schedule.")
    ] = 2e-5,
    schedule: Annotated[
        str, typer.Option("--schedule", help="After the warm-up: cosine, linear or constant.")
    ] = "cosine",
    warmup: Annotated[
        float, typer.Option("--warmup", help="Fraction of the steps in which the rate rises.")
    ] = 0.03,
    weight_decay: Annotated[
        float, typer.Option("--weight-decay", help="Weight decay of AdamW, for matrices only.")
    ] = 0.0,
    clip_norm: Annotated[
        float, typer.Option("--clip-norm", help="Largest global norm of the gradients.")
    ] = 1.0,
    patience: Annotated[
        int | None,
        typer.Option("--patience", help="Stop after this many validations without a better one."),
    ] = None,
    evaluate_every: Annotated[
        int | None,
        typer.Option("--evaluate-every", help="Steps between validations; by default an epoch."),
    ] = None,
    save_every: Annotated[
        int, typer.Option("--save-every", help="Steps between checkpoints for --resume; 0: none.")
    ] = 500,
    lora_rank: Annotated[
        int | None, typer.Option("--lora-rank", help="Rank r of the adapter; by default 8.")
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option("--lora-alpha", help="Scale alpha / r; by default 32.")
    ] = None,
    lora_dropout: Annotated[
        float | None, typer.Option("--lora-dropout", help="Fraction of inputs; by default 0.1.")
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(
            "--target-modules", help="Linear layers, or all-linear; by default q_proj,v_proj."
        ),
    ] = None,
    rslora: Annotated[
        bool | None, typer.Option("--rslora", help="Scale alpha / sqrt(r) instead.")
    ] = None,
    ewc_fisher: Annotated[
        list[Path] | None,
        typer.Option(
            "--ewc-fisher", help="File that --save-fisher wrote for an earlier task. Repeatable."
        ),
    ] = None,
    ewc_data: Annotated[
        list[Path] | None,
        typer.Option("--ewc-data", help="Rows of an earlier task that MODEL knows. Repeatable."),
    ] = None,
    ewc_strength: Annotated[
        float | None, typer.Option("--ewc-strength", help="Lambda: loss + lambda/2 F (change)^2.")
    ] = None,
    ewc_decay: Annotated[
        float | None,
        typer.Option(
            "--ewc-decay",
            help="Online EWC: one anchor for all earlier tasks, whose Fisher information decays by "
            "this factor with each; by default an anchor for each.",
        ),
    ] = None,
    ewc_samples: Annotated[
        int, typer.Option("--ewc-samples", help="Rows to compute Fisher information on.")
    ] = 256,
    save_fisher: Annotated[
        bool, typer.Option("--save-fisher", help="Write OUT/ewc/fisher.safetensors as well.")
    ] = False,
    field: opt.Field = None,
    prompt_field: opt.PromptField = None,
    completion_field: opt.CompletionField = None,
    max_tokens: opt.MaxTokens = 512,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the row order and dropout.")] = 0,
    compute_dtype: opt.ComputeDtype = None,
    out_dtype: Annotated[
        str | None,
        typer.Option("--out-dtype", help="Dtype of the weights written; by default as read."),
    ] = None,
    remat: Annotated[
        bool,
        typer.Option("--remat", help="Save memory: recompute activations in the backward pass."),
    ] = False,
    mesh: Annotated[
        str,
        typer.Option(
            "--mesh",
            help="Devices, such as data=2,fsdp=2,tensor=2: replicas of the parameters, shards to "
            "gather before use, shards to compute with.",
        ),
    ] = "data=1",
    shard_size: opt.ShardSize = "5GB",
    ignore_config: opt.IgnoreConfig = None,
    device: opt.Device = None,
    resume: opt.Resume = False,
    force: opt.Force = False,
    no_compilation_cache: opt.NoCache = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Train a model on rows of text, and write a new model folder.

    \b
    Example: recall finetune base --data french.jsonl --out french --validation-share 0.05
    """
    console.prepare_jax(no_compilation_cache, device)
    from recall_jax.jobs import finetune as job
    from recall_jax.training.settings import TrainingSettings, lora_spec

    modules = None if target_modules is None else tuple(map(str.strip, target_modules.split(",")))
    settings = TrainingSettings(
        data=str(data),
        method=method,
        validation=None if validation is None else str(validation),
        validation_share=validation_share,
        field=field,
        prompt_field=prompt_field,
        completion_field=completion_field,
        max_tokens=max_tokens,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        seed=seed,
        patience=patience,
        evaluate_every=evaluate_every,
        save_every=save_every,
        compute_dtype=compute_dtype,
        out_dtype=out_dtype,
        remat=remat,
        mesh=mesh,
        lora=lora_spec(
            method,
            r=lora_rank,
            alpha=lora_alpha,
            dropout=lora_dropout,
            target_modules=modules,
            use_rslora=rslora,
        ),
        ewc_fisher=tuple(map(str, ewc_fisher or ())),
        ewc_data=tuple(map(str, ewc_data or ())),
        ewc_strength=ewc_strength,
        ewc_decay=ewc_decay,
        ewc_samples=ewc_samples,
        save_fisher=save_fisher,
        ignore_config=tuple(ignore_config or ()),
    )
    options = job.FinetuneOptions(
        force=force, resume=resume, shard_bytes=console.size_in_bytes(shard_size)
    )
    with console.progress_bar(quiet) as progress:
        record = job.finetune(
            model,
            out,
            settings,
            options=options,
            progress=progress,
            announce=lambda line: console.say(line, quiet),
        )
    console.warn(record["warnings"])
    console.say(_summary(record, out), quiet)


def _summary(record: dict[str, Any], out: Path) -> list[str]:
    """Return a few lines about a finished fine-tuning."""
    losses, best, speed = record["losses"], record["best_step"], record["tokens_per_second"]
    lines = [f"trained {record['model']} into {out} by {record['method']}"]
    lines.append(
        f"  {record['steps']} of {record['steps_planned']} steps, loss {losses[0]:.4f} to "
        f"{losses[-1]:.4f}"
    )
    if best is not None:
        loss = dict(map(tuple, record["validation_losses"]))[best]
        lines.append(f"  kept: step {best}, validation loss {loss:.4f}")
    seconds = record["timing_s"]["training"]
    lines.append(
        f"  {record['tokens']:,} tokens in {seconds:.1f} s"
        + (f", {speed:,.0f} tokens/s once compiled" if speed else "")
    )
    return lines
