"""Define `recall bench`: measure throughput on the current device."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recall_jax.cli import console
from recall_jax.cli import options as opt
from recall_jax.errors import InputError

if TYPE_CHECKING:
    from recall_jax.similarity.throughput import Benchmark

bench = typer.Typer(
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure throughput on this machine, compared with other software.",
)
_DEFAULTS = ("100,300,1000", "256,1024", "1,4", 5)
_QUICK = ("32,64", "16", "1,3", 2)
_QUICK_MEASURES = "cka,rbf_cka,procrustes_distance,rsa,mutual_knn"


@bench.command("similarity")
def bench_similarity(
    samples: Annotated[
        str | None, typer.Option("--samples", help=f"Numbers of samples; default {_DEFAULTS[0]}.")
    ] = None,
    width: Annotated[
        str | None, typer.Option("--width", help=f"Numbers of features; default {_DEFAULTS[1]}.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", help=f"Numbers of layers; default {_DEFAULTS[2]}."),
    ] = None,
    measure: Annotated[
        str | None, typer.Option("--measure", help="Measures, comma-separated; default all.")
    ] = None,
    repeat: Annotated[
        int | None,
        typer.Option(
            "--repeat", min=1, help=f"Calls to time, within five seconds; default {_DEFAULTS[3]}."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few measures at small sizes, in seconds.")
    ] = False,
    out: Annotated[
        Path, typer.Option("--out", help="Folder to write: similarity.json and similarity.svg.")
    ] = Path("recall_bench"),
    device: opt.Device = None,
    force: opt.Force = False,
    no_compilation_cache: opt.NoCache = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Time every measure of similarity, for all pairs of layers of two models.

    The best-known measures are compared with plain numpy and, if installed, scikit-learn. Takes
    minutes, or seconds with --quick.

    \b
    Example: recall bench similarity --samples 100,1000 --measure cka,rsa --out bench
    """
    defaults = _QUICK if quick else _DEFAULTS
    sizes = [
        _numbers(name, given or default)
        for name, given, default in zip(
            ("samples", "width", "layers"), (samples, width, layers), defaults[:3], strict=True
        )
    ]
    console.prepare_jax(no_compilation_cache, device)
    from itertools import product

    from recall_jax.files.output import output_folder
    from recall_jax.similarity import throughput

    names = _measures(measure or (_QUICK_MEASURES if quick else "all"))
    shapes = [throughput.Shape(*each) for each in product(*sizes)]
    with output_folder(out, force=force) as folder:
        with console.progress_bar(quiet) as progress:
            found = throughput.run_benchmark(
                names, shapes, repeat=repeat or defaults[3], progress=progress
            )
        _write(folder, found)
    if not quiet:
        _show(found)
    console.say([*found.missing, f"every figure, and a plot over samples: {out}"], quiet)


def _numbers(name: str, text: str) -> list[int]:
    """Parse positive integers in a text such as 100,1000, and sort them."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise InputError(f"--{name} {text}: give positive integers, comma-separated")
    return sorted({int(word) for word in words})


def _measures(text: str) -> list[str]:
    from recall_jax.similarity.measures import ALIASES, MEASURES, find_measure

    if text.strip() == "all":
        return list(MEASURES)
    names = [word.strip() for word in text.split(",")]
    for name in names:
        find_measure(name)
    return list(dict.fromkeys(ALIASES.get(name, name) for name in names))


def _write(folder: Path, found: "Benchmark") -> None:
    from recall_jax.files.json_objects import write_json_object
    from recall_jax.report.throughput_chart import draw_throughput

    write_json_object(folder / "similarity.json", found.record())
    (folder / "similarity.svg").write_text(draw_throughput(found), encoding="utf-8")


def _show(found: "Benchmark") -> None:
    names = list(dict.fromkeys(one.name for case in found.cases for one in case.others))
    columns = ["measure", "samples", "width", "pairs", "ms", "pairs/s", "of roof", *names]
    rows = []
    for case in found.cases:
        faster = {
            one.name: "" if one.times_slower is None else f"{one.times_slower:.1f}"
            for one in case.others
        }
        shape = case.shape
        rows.append(
            [
                case.measure,
                *map(str, (shape.samples, shape.width, shape.pairs)),
                f"{1000 * case.seconds.median:.2f}",
                f"{case.pairs_per_second:,.0f}",
                f"{case.roof_fraction:.0%}",
                *(faster.get(name, "") for name in names),
            ]
        )
    roof = f"{found.roof / 1e9:,.0f} GFLOP/s"
    title = f"all pairs of layers; roof: {roof}; others: their time for a pair over ours"
    console.show_table(title, columns, rows)
