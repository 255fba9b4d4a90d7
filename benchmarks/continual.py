"""The big table: every strategy on the suites of strings and of library text.

    .venv/bin/python benchmarks/continual.py --quick     # strings, one seed and order
    .venv/bin/python benchmarks/continual.py             # both suites, three seeds, two orders

Suites and results go to --folder: what is there is kept, so that the same command goes on where it
was interrupted. Recipes are those of configs/continual.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml
from measure import environment

CONFIGS = Path(__file__).parent.parent / "configs" / "continual"
SUITES = ("strings", "text")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="strings, one seed and order")
    parser.add_argument("--folder", type=Path, default=Path("continual"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    began = time.time()
    for suite in SUITES[:1] if args.quick else SUITES:
        protocol = yaml.safe_load((CONFIGS / f"{suite}.yml").read_text())
        name = suite
        if args.quick:
            name = f"{suite}-quick"
            protocol |= {"seeds": protocol["seeds"][:1], "orders": protocol["orders"][:1]}
        recipe = args.folder / f"{name}.yml"
        recipe.write_text(yaml.safe_dump(protocol, sort_keys=False))
        for seed in protocol["seeds"]:
            made = ["--out", f"suites/{suite}-{seed}", "--seed", str(seed)]
            recall("suite", suite, *made, folder=args.folder)
        if not (args.folder / name).exists():
            recall("continual", recipe.name, "--out", name, "--resume", folder=args.folder)
        print(f"\n{name}\n\n{(args.folder / name / 'table.md').read_text()}")
    print(environment())
    print(f"{(time.time() - began) / 3600:.2f} hours")


def recall(*arguments: str, folder: Path) -> None:
    """Run a command of recall in `folder`; its failure is ours."""
    command = shutil.which("recall", path=str(Path(sys.executable).parent)) or "recall"
    done = subprocess.run([command, *arguments], cwd=folder, check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
