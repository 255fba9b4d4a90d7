"""Define `recall similarity`: compare models, every unit with every other."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recall_jax.cli import console
from recall_jax.cli import options as opt
from recall_jax.cli.merge import sample_values
from recall_jax.errors import InputError
from recall_jax.inputs.shapes import Fields

if TYPE_CHECKING:
    from recall_jax.similarity.study import MeasureResult, Study


def similarity(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Models, of one architecture or of several."),
    ] = None,
    data: opt.Data = None,
    typical: opt.TypicalFile = None,
    reps: Annotated[
        Path | None,
        typer.Option(
            "--reps",
            help="Representations instead of models (.npz): from `recall extract`, or any arrays "
            "(rows, width) and (units, rows, width).",
        ),
    ] = None,
    measure: Annotated[
        str,
        typer.Option(
            "--measure",
            help="Measures, comma-separated, with options in parentheses: cka,mutual_knn(k=5); or "
            "all. See --list.",
        ),
    ] = "rbf",
    layers: Annotated[
        str,
        typer.Option("--layers", help="all, last, or units such as embed,0,4,8-12,head."),
    ] = "all",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write: matrices, heat maps, index.html."),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option("--block-size", min=1, help="Rows at a time; by default as many as fit."),
    ] = None,
    list_measures: Annotated[
        bool, typer.Option("--list", help="List the measures with their options, and exit.")
    ] = False,
    field: opt.Field = None,
    prompt_field: opt.PromptField = None,
    completion_field: opt.CompletionField = None,
    pool: Annotated[
        int, typer.Option("--pool", min=1, help="Take at most this many rows, drawn by seed.")
    ] = 1024,
    max_tokens: opt.MaxTokens = 512,
    batch_size: opt.BatchSize = 8,
    seed: opt.Seed = 0,
    compute_dtype: opt.ComputeDtype = None,
    ignore_config: opt.IgnoreConfig = None,
    ignore_tokenizers: opt.IgnoreTokenizers = False,
    memory: opt.Memory = None,
    device: opt.Device = None,
    force: opt.Force = False,
    no_compilation_cache: opt.NoCache = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Compare models, unit by unit.

    Compares every unit of every model with every other, by any of the measures.

    \b
    Example: recall similarity base math french --data french.jsonl --measure rbf,cka --out seen
    """
    if list_measures:
        console.prepare_jax(no_compilation_cache, device)
        _list_measures()
        return
    if bool(models) == (reps is not None) or (reps and (data or typical)):
        raise InputError("give either models with --data or --typical, or --reps")
    console.prepare_jax(no_compilation_cache, device)
    from recall_jax.files.output import output_folder
    from recall_jax.inputs.settings import make_samples
    from recall_jax.jobs.states import choose_units, read_states, states_of_models
    from recall_jax.similarity.choice import parse_measures
    from recall_jax.similarity.study import compare_all

    choices = parse_measures(measure)
    inputs = [path for path in (data, typical, reps, *map(Path, models or [])) if path]
    # Entered first, so that a folder that cannot be written is refused before anything runs.
    with output_folder(out, force=force, inputs=inputs) if out else nullcontext() as folder:
        with console.progress_bar(quiet) as progress:
            if reps is not None:
                found, rows = read_states(reps)
            else:
                fields = Fields(field, prompt_field, completion_field)
                values = sample_values(data, typical, fields, pool, max_tokens, batch_size, seed)
                found, rows = states_of_models(
                    models or [],
                    make_samples(values),
                    dtype_name=compute_dtype,
                    ignore_config=ignore_config or (),
                    ignore_tokenizers=ignore_tokenizers,
                    memory=console.optional_size(memory),
                    progress=progress,
                )
            study = compare_all(
                choose_units(found, layers),
                rows,
                choices,
                block_size=block_size,
                leave_out=measure.strip() == "all",
                progress=progress,
            )
        if folder is not None:
            settings = {
                "source": str(reps or data or typical),
                "measures": measure,
                "layers": layers,
                **({} if reps else {"max_tokens": max_tokens, "pool": pool, "seed": seed}),
            }
            _write(folder, study, settings)
    console.warn(study.warnings)
    if not quiet:
        for result in study.results:
            _show(study, result)
    if out is not None:
        console.say(
            f"every pair of units, and what is seen over depth: {out / 'index.html'}", quiet
        )


def _write(folder: Path, study: "Study", settings: dict[str, object]) -> None:
    from recall_jax.parallel.machine import device, versions
    from recall_jax.report.study_files import write_study
    from recall_jax.similarity.study import study_record

    record = study_record(study)
    record |= {"settings": settings, "versions": versions(), "device": device()}
    write_study(folder, study, record)


def _show(study: "Study", result: "MeasureResult") -> None:
    """Print the last model's similarity with the others at the same depth, or with itself."""
    last = len(study.models) - 1
    newest = study.models[last]
    if last == 0:
        title = f"{result.choice.label} of adjacent units"
        columns = ["unit", "next unit", newest.name]
        steps = zip(newest.body[:-1], newest.body[1:], study.adjacent(result, 0), strict=True)
        rows = [[unit, after, f"{value:.4f}"] for unit, after, value in steps]
    else:
        title = f"{result.choice.label} with {newest.name}"
        curves = [study.same_depth(result, last, other, heads=True) for other in range(last)]
        columns = ["unit", *(model.name for model in study.models[:-1])]
        rows = [
            [unit, *(f"{curve.values[index]:.4f}" for curve in curves)]
            for index, unit in enumerate(newest.units)
        ]
    kind = "distance" if result.distance else "similarity"
    console.show_table(f"{title} ({kind})", columns, rows)


def _list_measures() -> None:
    from recall_jax.report.similarity_page import first_line
    from recall_jax.similarity.measures import ALIASES, MEASURES

    short = {name: alias for alias, name in ALIASES.items()}
    for name, measure in MEASURES.items():
        low, high = measure.bounds
        options = [
            f"{option}={str(measure.defaults[option]).lower()}"
            if option in measure.defaults
            else f"{option}=…"
            for option in measure.options
        ]
        written = f"({', '.join(options)})" if options else ""
        alias = f" or {short[name]}" if name in short else ""
        kind = "distance" if measure.distance else "similarity"
        console.say(f"{name}{written}{alias}: {kind} from {low:g} to {high:g}", quiet=False)
        console.say(f"    {first_line(measure)}", quiet=False)
