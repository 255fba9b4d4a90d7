"""Define `recall select`, `extract` and `weights`: the stages of RECALL as separate commands."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recall_jax.cli import console
from recall_jax.cli import options as opt
from recall_jax.cli.merge import as_number, sample_values
from recall_jax.inputs.shapes import Fields

if TYPE_CHECKING:
    from recall_jax.engine.layout import Layout
    from recall_jax.methods.recall import RecallParameters

Sigma = Annotated[str, typer.Option("--sigma", help="median, dim or a number.")]
Temperature = Annotated[
    float, typer.Option("--temperature", help="Temperature of the softmax over models; above 0.")
]
Reference = Annotated[
    str,
    typer.Option("--reference", help="newest, pairwise, a model's name, or its index from 0."),
]
SimilarityName = Annotated[
    str,
    typer.Option("--similarity", help="rbf, cosine, linear_cka, or a mix: rbf=0.5,cosine=0.5."),
]
Alignment = Annotated[
    str, typer.Option("--alignment", help="none, center, or procrustes onto the reference.")
]
MergedUnits = Annotated[
    str,
    typer.Option(
        "--merged-units",
        help="all, or the first, middle or last third; others are the newest model's.",
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option("--threshold", help="Use the newest model's units below this mean similarity."),
]
AllRows = Annotated[
    int | None,
    typer.Option("--pool", min=1, help="Take at most this many rows, drawn by seed; else all."),
]

_ALL_ROWS = 1 << 62


def select(
    model: Annotated[str, typer.Argument(help="Model whose hidden states are clustered.")],
    data: Annotated[Path, typer.Option("--data", help="Rows of text to choose from.")],
    out: Annotated[Path, typer.Option("--out", help="File of typical samples to write (.jsonl).")],
    field: opt.Field = None,
    prompt_field: opt.PromptField = None,
    completion_field: opt.CompletionField = None,
    count: opt.Count = 20,
    pool: opt.Pool = 1024,
    max_tokens: opt.MaxTokens = 512,
    batch_size: opt.BatchSize = 8,
    seed: opt.Seed = 0,
    unit: opt.Unit = "last",
    compute_dtype: opt.ComputeDtype = None,
    ignore_config: opt.IgnoreConfig = None,
    memory: opt.Memory = None,
    device: opt.Device = None,
    mesh: opt.Mesh = None,
    force: opt.Force = False,
    no_compilation_cache: opt.NoCache = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Choose typical samples of a data file.

    They are the rows nearest to the centroids of k-means over the model's pooled hidden states.

    \b
    Example: recall select french --data french.jsonl --out typical.jsonl
    """
    console.prepare_jax(no_compilation_cache, device)
    from recall_jax.files.output import output_file
    from recall_jax.inputs.data import write_jsonl
    from recall_jax.inputs.settings import make_samples
    from recall_jax.jobs import stages

    fields = Fields(field, prompt_field, completion_field)
    values = sample_values(data, None, fields, pool, max_tokens, batch_size, seed)
    samples = make_samples(values | {"count": count, "unit": as_number(unit)})
    with (
        output_file(out, force=force, inputs=[data]) as hidden,
        console.progress_bar(quiet) as progress,
    ):
        found = stages.select(
            model,
            samples,
            dtype_name=compute_dtype,
            ignore_config=ignore_config or (),
            memory=console.optional_size(memory),
            layout=_layout(mesh),
            progress=progress,
        )
        write_jsonl(hidden, found.samples.typical_rows())
    console.warn(found.typical.warnings() if found.typical else [])
    rows = ", ".join(map(str, found.samples.indices))
    console.say(f"{len(found.samples.rows)} typical rows in {out}: {rows}", quiet)


def extract(
    models: Annotated[list[str], typer.Argument(help="Models of one architecture.")],
    out: Annotated[Path, typer.Option("--out", help="File of representations to write (.npz).")],
    data: opt.Data = None,
    typical: opt.TypicalFile = None,
    field: opt.Field = None,
    prompt_field: opt.PromptField = None,
    completion_field: opt.CompletionField = None,
    pool: AllRows = None,
    max_tokens: opt.MaxTokens = 512,
    batch_size: opt.BatchSize = 8,
    seed: opt.Seed = 0,
    compute_dtype: opt.ComputeDtype = None,
    ignore_config: opt.IgnoreConfig = None,
    ignore_tokenizers: opt.IgnoreTokenizers = False,
    memory: opt.Memory = None,
    device: opt.Device = None,
    mesh: opt.Mesh = None,
    force: opt.Force = False,
    no_compilation_cache: opt.NoCache = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Pool the hidden states of every unit.

    The file holds `reps` (models, units, rows, width) float32, `rows`, `units` and `models`.

    \b
    Example: recall extract base math french --typical typical.jsonl --out reps.npz
    """
    console.prepare_jax(no_compilation_cache, device)
    from recall_jax.files.output import output_file
    from recall_jax.inputs.settings import make_samples
    from recall_jax.jobs import stages

    rows = pool or _ALL_ROWS
    fields = Fields(field, prompt_field, completion_field)
    values = sample_values(data, typical, fields, rows, max_tokens, batch_size, seed)
    with (
        output_file(out, force=force, inputs=filter(None, [data, typical])) as hidden,
        console.progress_bar(quiet) as progress,
    ):
        found = stages.extract(
            models,
            make_samples(values),
            dtype_name=compute_dtype,
            ignore_config=ignore_config or (),
            ignore_tokenizers=ignore_tokenizers,
            memory=console.optional_size(memory),
            layout=_layout(mesh),
            progress=progress,
        )
        stages.save_representations(hidden, found)
    shape = " x ".join(map(str, found.reps.shape))
    console.say(f"representations {shape} (models, units, rows, width) in {out}", quiet)


def weights(
    reps: Annotated[Path, typer.Option("--reps", help="Representations from `recall extract`.")],
    out: Annotated[Path, typer.Option("--out", help="File of weights to write (.json).")],
    sigma: Sigma = "median",
    temperature: Temperature = 1.0,
    reference: Reference = "newest",
    similarity: SimilarityName = "rbf",
    alignment: Alignment = "none",
    merged_units: MergedUnits = "all",
    threshold: Threshold = None,
    force: opt.Force = False,
    no_compilation_cache: opt.NoCache = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Compute the models' weights from their representations.

    \b
    Example: recall weights --reps reps.npz --out weights.json
    """
    console.prepare_jax(no_compilation_cache)
    from recall_jax.files.json_objects import write_json_object
    from recall_jax.files.output import output_file
    from recall_jax.jobs import stages

    parameters = _parameters(
        sigma,
        reference,
        similarity,
        temperature=temperature,
        alignment=alignment,
        merged_units=merged_units,
        threshold=threshold,
    )
    with output_file(out, force=force, inputs=[reps]) as hidden:
        record = stages.weigh(stages.load_representations(reps), parameters)
        write_json_object(hidden, record)
    console.warn(record["warnings"])
    if not quiet:
        _show("weights", record["units"], record["models"], record["weights"])


def _layout(mesh: str | None) -> "Layout":
    if mesh is None:
        from recall_jax.engine.layout import ON_HOST

        return ON_HOST
    from recall_jax.engine.pod.layout import Sharded
    from recall_jax.parallel.mesh import named_mesh

    return Sharded(named_mesh(mesh))


def _parameters(sigma: str, reference: str, similarity: str, **others: Any) -> "RecallParameters":
    from recall_jax.recipes.recipe import make_recall_parameters

    mix: Any = similarity
    if "=" in similarity:
        pairs = [part.partition("=") for part in similarity.split(",")]
        mix = {name.strip(): as_number(weight) for name, _, weight in pairs}
    index = as_number(reference)
    return make_recall_parameters(
        {
            "sigma": as_number(sigma),
            "reference": index if isinstance(index, int) else reference,
            "similarity": mix,
            **others,
        }
    )


def _show(title: str, units: list[str], models: list[str], values: list[list[float]]) -> None:
    rows = [[unit, *(f"{row[index]:.4f}" for row in values)] for index, unit in enumerate(units)]
    console.show_table(title, ["unit", *models], rows)
