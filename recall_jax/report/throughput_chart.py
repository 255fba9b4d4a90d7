"""Draw the results of a benchmark: for each measure, seconds for a pair over samples."""

from recall_jax.report.log_log import Chart, log_log_charts
from recall_jax.report.matrix_map import standalone
from recall_jax.similarity.throughput import Benchmark

OURS = "recall"


def draw_throughput(found: Benchmark) -> str:
    """Return the content of an SVG file, for the greatest width and number of layers."""
    width, layers = (
        max(getattr(case.shape, name) for case in found.cases) for name in ("width", "layers")
    )
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for case in found.cases:
        if (case.shape.width, case.shape.layers) != (width, layers):
            continue
        chart = lines.setdefault(case.measure, {OURS: []})
        samples = float(case.shape.samples)
        chart[OURS].append((samples, 1 / case.pairs_per_second))
        for other in case.others:
            if other.seconds is not None:
                chart.setdefault(other.name, []).append((samples, other.seconds.median))
    charts = [Chart(measure, chart) for measure, chart in lines.items()]
    about = f"samples, at width {width} and {layers} layers"
    return standalone(log_log_charts(charts, x_title=about, y_title="seconds for a pair"))
