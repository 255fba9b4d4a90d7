"""Whatever a file holds: the work, or one line on stderr; no traceback, hang, gigabyte or file."""

import contextlib
import random
import signal
import traceback
from pathlib import Path
from typing import Any

import pytest
from things import OTHERS, THINGS, Damage, Use
from toys import tree

MOST_SECONDS = 10
MOST_MEMORY = 1 << 30
MANY = 10_000
FEWER = 2_000
# Of Orbax's threads, when what it reads ends in an error; the command line is silent about them.
IGNORED = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning"),
]
NAMES = [pytest.param(name, marks=IGNORED if "orbax" in name else []) for name in THINGS | OTHERS]


def memory(key: str) -> int:
    """A figure of /proc/self/status in bytes, 0 where there is none."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


@contextlib.contextmanager
def within(seconds: int):
    """Of this process's time on processors: other alarms are pytest's."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"over {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def fuzz(file: Path, damage: Damage, uses: list[Use], folder: Path, seeds: range) -> None:
    """Damage a file in as many ways as there are seeds, and let all that read it read it."""
    whole, names = file.read_bytes(), set(tree(folder))
    for use in uses:  # what a whole file takes, a damaged one may take too
        use()
    if (reset := Path("/proc/self/clear_refs")).exists():
        reset.write_text("5")
    start = memory("VmRSS")
    for seed in seeds:
        content = damage(whole, random.Random(seed))
        file.write_bytes(content)
        use = uses[seed % len(uses)]
        try:
            with within(MOST_SECONDS):
                use()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            said = "".join(traceback.format_exception(error)[-12:])
            pytest.fail(f"seed {seed}: {content[:3000]!r}\n{said}", pytrace=False)
        grown = memory("VmHWM") - start
        assert grown < MOST_MEMORY, f"seed {seed}: {content[:3000]!r}: {grown} bytes"
        if seed % 50 == 0:
            assert set(tree(folder)) == names, f"by seed {seed}"
    assert set(tree(folder)) == names


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_damaged(name, toys, tmp_path):
    thing = (THINGS | OTHERS)[name](toys, tmp_path)
    fuzz(thing.file, thing.damage, thing.uses, tmp_path, range(200))


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_damaged_in_many_ways(name, toys, tmp_path):
    thing = (THINGS | OTHERS)[name](toys, tmp_path)
    count = MANY if name in THINGS else FEWER
    uses = thing.uses + thing.at_length
    fuzz(thing.file, thing.damage, uses, tmp_path, range(200, 200 + count))
