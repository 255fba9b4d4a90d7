"""Shows that two commits of this project give the same; run by hand:

    python tests/compare_commits.py BEFORE [AFTER] [--work DIR] [--only REGEX]

Each runs the commands of `commit_cases.py` on the same models, at the same paths and with this
interpreter; then every file that they wrote is compared, and all that they printed. AFTER is what
git tracks of the working tree unless it is named. In DIR a case that a commit has run is kept, and
not run again. The exit status is 1 if anything differs that is not EXPECTED, or a command failed.
"""

import argparse
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import yaml
from commit_cases import TESTS, make_cases, make_inputs, make_recipes
from compared_files import differences

# Differences that are meant: a pattern of the lines printed, and the reason.
EXPECTED = {
    r"^[^:]*: line \d+, words alone": "pages, cards and messages were reworded; their numbers stay",
    r"\.json: \S*\.about: ": "descriptions of strategies and axes, reworded",
    r"warnings\.\d+: .*; nothing is cut\" became .*; nothing is truncated\"$": "reworded",
    r"^similarity/toys/index.html: ": "the range of a measure left its docstring, which is shown; "
    "similarity.json holds all numbers",
}
NOT_COMPARED = {
    r"/tree/": "Orbax draws the names of its files; what they hold is read with Orbax instead",
}


def main() -> int:
    """Run both commits, print what differs, and return the exit status."""
    words = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    words.add_argument("before")
    words.add_argument("after", nargs="?", help="by default the working tree")
    words.add_argument("--work", type=Path, help="folder to work in, and to leave results in")
    words.add_argument("--only", default="", help="run the cases that this pattern is found in")
    asked = words.parse_args()
    after = asked.after or git("stash", "create") or "HEAD"
    with tempfile.TemporaryDirectory() as scratch:
        work = (asked.work or Path(scratch)).absolute()
        commits = [git("rev-parse", f"{name}^{{commit}}") for name in (asked.before, after)]
        for commit in commits:
            Runner(work, commit).run_cases(asked.only)
        before, after = (work / "results" / commit for commit in commits)
        return report(before, after, asked.only)


def git(*words: str) -> str:
    return subprocess.check_output(["git", "-C", TESTS.parent, *words], text=True).strip()


class Runner:
    """Runs the command line of one commit, whose files are laid out in `work/code`."""

    def __init__(self, work: Path, commit: str) -> None:
        self.code, self.folder = work / "code", work / "run"
        self.results = work / "results" / commit
        shutil.rmtree(self.code, ignore_errors=True)
        self.code.mkdir(parents=True)
        archive = subprocess.check_output(["git", "-C", TESTS.parent, "archive", commit])
        subprocess.run(["tar", "-x", "-C", self.code], input=archive, check=True)
        project = tomllib.loads((self.code / "pyproject.toml").read_text())["project"]
        self.module, _, self.function = project["scripts"]["recall"].partition(":")
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("JAX_", "XLA_", "TF_"))}
        self.environment = kept | {
            "PYTHONPATH": f"{self.code}{os.pathsep}{TESTS}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "XDG_CACHE_HOME": str(work / "cache"),
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
        }
        where = [sys.executable, "-c", "import recall_jax; print(recall_jax.__file__)"]
        found = subprocess.check_output(where, cwd=work, env=self.environment, text=True)
        assert Path(found).is_relative_to(self.code), found
        if not self.folder.exists():
            make_inputs(self.folder, self.code)

    def run_cases(self, only: str) -> None:
        """Run the cases that have no results yet."""
        recipes = make_recipes(self.code, self.methods())
        shutil.rmtree(self.folder / "recipes", ignore_errors=True)
        (self.folder / "recipes").mkdir()
        for name, values in recipes.items():
            text = yaml.safe_dump(values, sort_keys=False)
            (self.folder / "recipes" / f"{name}.yml").write_text(text)
        for name, lines in make_cases(recipes).items():
            if re.search(only, name) and not (self.results / name).exists():
                print(f"{self.results.name[:7]}: {name}", file=sys.stderr, flush=True)
                shutil.rmtree(self.folder / "out", ignore_errors=True)
                (self.folder / "out").mkdir()
                for number, line in enumerate(lines):
                    said = self.run_line(line)
                    (self.folder / "out" / f"{number}.said").write_text(f"recall {line}\n{said}")
                self.results.mkdir(parents=True, exist_ok=True)
                (self.folder / "out").rename(self.results / name)

    def methods(self) -> list[str]:
        """Return the names of all merge methods, which the refusal of an unknown one tells."""
        (self.folder / "none.yml").write_text("{merge_method: none, models: [{model: none}]}")
        said = self.run_line("merge none.yml out/none")
        return said.partition("choose from ")[2].split("\n")[0].split(", ")

    def run_line(self, line: str) -> str:
        """Run a command line, by two processes if it says so; return statuses and what was said."""
        start = f"from {self.module} import {self.function} as run; run()"
        words = [sys.executable, "-c", start, *shlex.split(line)]
        if line == "IN MEMORY":
            words = [sys.executable, str(TESTS / "commit_cases.py"), "out/npz", "out"]
        processes = 2 if "--distributed" in words else 1
        devices = 4 if "--mesh" in words else 1
        shared = self.environment | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
            "JAX_NUM_PROCESSES": str(processes),
        }
        running = [
            subprocess.Popen(
                [word.replace("{}", str(index)) for word in words],
                cwd=self.folder,
                env=shared | {"JAX_PROCESS_ID": str(index)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(processes)
        ]
        texts = ["".join(process.communicate()) for process in running]
        return "".join(f"status {p.returncode}\n{t}" for p, t in zip(running, texts, strict=True))


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def report(before: Path, after: Path, only: str) -> int:
    """Print a line for each file that differs, and a summary; return the exit status."""
    files: dict[str, None] = {}
    for root in (before, after):
        for path in sorted(root.rglob("*")):
            name = str(path.relative_to(root))
            compared = path.is_file() or path.name == "tree"
            if compared and re.search(only, name.split("/")[0]) and not_compared(name) is None:
                files[name] = None
    unexpected = expected = failed = 0
    for name in files:
        lines = [f"{name}: {line}" for line in differences(before / name, after / name)]
        meant = [line for line in lines if any(re.search(p, line) for p in EXPECTED)]
        others = [line for line in lines if line not in meant]
        unexpected, expected = unexpected + bool(others), expected + bool(meant and not others)
        if others:
            more = f" (and {len(others) - 1} more places)" if others[1:] else ""
            print(f"{others[0]}{more}")
        if name.endswith(".said") and (wrong := failure(after / name)):
            failed += 1
            print(f"{name}: failed: {wrong}")
    print(f"{len(files)} files: {unexpected} differ, {expected} as expected; {failed} faults")
    return int(bool(unexpected or failed))


def not_compared(name: str) -> str | None:
    """Return the reason why a file is left out."""
    return next((why for pattern, why in NOT_COMPARED.items() if re.search(pattern, name)), None)


def failure(said: Path) -> str:
    """Return the last line that a failed command said, or nothing."""
    text = said.read_text() if said.exists() else ""
    return text.splitlines()[-1] if re.search(r"^status [^0]", text, re.MULTILINE) else ""


if __name__ == "__main__":
    sys.exit(main())
