"""Cost of a merge against the number of models K and of layers L: is it a straight line?

    .venv/bin/python benchmarks/scaling.py [--runs 3] [--folder DIR] [--plot benchmarks/scaling.svg]

Whole processes on random Llama checkpoints of width 512 in bfloat16, read warm, K from 2 to 8 at
L = 18 and L from 9 to 36 at K = 3; RECALL on 8 typical samples of 64 tokens. Of each series the
least-squares line and the share of the variance it explains (R^2).
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from measure import environment, make_models, median, report, run_process

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
MODELS, LAYERS = range(2, 9), (9, 18, 27, 36)
METHODS = ("average", "recall")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir(), "recall_scaling")
    )
    args = parser.parse_args()
    cases = {"models K": [(k, 18) for k in MODELS], "layers L": [(3, layers) for layers in LAYERS]}
    rows: list[dict[str, object]] = []
    panels = []
    for number, (what, sizes) in enumerate(cases.items()):
        for method in METHODS:
            x = np.asarray([size[number] for size in sizes], float)
            y = np.asarray([_seconds(method, *size, args.runs, args.folder) for size in sizes])
            slope, start = np.polyfit(x, y, 1)
            explained = 1 - np.var(y - slope * x - start) / np.var(y)
            rows.append(
                {
                    "method": method,
                    what: x.astype(int).tolist(),
                    "seconds": y.round(3).tolist(),
                    "line": f"{start:.3f} + {slope:.4f} x",
                    "r_squared": round(float(explained), 4),
                }
            )
            panels.append(_panel(len(panels), f"{method}, {what}", x, y, slope, start, explained))
    report(f"scaling, median of {args.runs} runs", rows, environment("jax", "recall-jax"))
    if args.plot:
        args.plot.write_text(_picture(panels), encoding="utf-8")


def _seconds(method: str, num_models: int, layers: int, runs: int, folder: Path) -> float:
    """Median wall time of the merge in a process of its own, after a warm-up."""
    models = make_models(folder, CONFIG | {"num_hidden_layers": layers}, num_models, (8, 64))
    out = folder / "out"
    recall = shutil.which("recall", path=str(Path(sys.executable).parent)) or "recall"
    if method == "average":
        recipe = folder / "average.yml"
        entries = "".join(f"- {{model: {model}}}\n" for model in models)
        recipe.write_text(f"merge_method: average\nmodels:\n{entries}")
        command = [recall, "merge", str(recipe), str(out)]
    else:
        command = [recall, "quick", *map(str, models), "--out", str(out)]
        command += ["--typical", str(folder / "typical.jsonl")]
    seconds = []
    for _ in range(runs + 1):
        shutil.rmtree(out, ignore_errors=True)
        seconds.append(run_process(command).seconds)
    return median(seconds[1:])


def _panel(
    place: int, title: str, x: np.ndarray, y: np.ndarray, slope: float, start: float, share: float
) -> str:
    """One chart, 340 by 240 pixels, two in a row."""
    left, top = 50 + place % 2 * 350, 40 + place // 2 * 250
    width, height, high = 280, 170, 1.1 * float(y.max())

    def at(x_value: float, y_value: float) -> tuple[float, float]:
        return left + width * x_value / (1.08 * x.max()), top + height * (1 - y_value / high)

    dots = "".join(
        '<circle cx="{:.1f}" cy="{:.1f}" r="4" fill="#1a5fb4"/>'.format(*at(*point))
        for point in zip(x, y, strict=True)
    )
    (x1, y1), (x2, y2) = at(0, start), at(x.max(), start + slope * x.max())
    marks = "".join(
        f'<text x="{at(value, 0)[0]:.1f}" y="{top + height + 16}" class="m">{value:.0f}</text>'
        for value in x
    )
    marks += "".join(
        f'<text x="{left - 6}" y="{at(0, value)[1] + 4:.1f}" class="y">{value:.1f}</text>'
        for value in np.linspace(0, float(y.max()), 4)
    )
    return (
        f'<text x="{left}" y="{top - 12}">{title}: {start:.2f} s + {slope:.3f} s each, '
        f"R² {share:.3f}</text>"
        f'<path d="M{left} {top}v{height}h{width}" fill="none" stroke="#888"/>'
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#c64600"/>'
        f"{dots}{marks}"
    )


def _picture(panels: list[str]) -> str:
    height = 40 + 250 * -(-len(panels) // 2)
    style = "text{font:12px sans-serif}.m{text-anchor:middle}.y{text-anchor:end}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" width="720">'
        f'<style>{style}</style><rect width="720" height="{height}" fill="#fff"/>'
        f"{''.join(panels)}</svg>\n"
    )


if __name__ == "__main__":
    main()
