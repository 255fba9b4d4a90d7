"""Where compiled programs are kept: a folder for each kind of processor."""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

# What tells kinds of processors apart, by the names that Linux gives it on x86 and on ARM.
_KIND = (
    "vendor_id",
    "cpu family",
    "model",
    "model name",
    "stepping",
    "flags",
    "CPU implementer",
    "CPU architecture",
    "CPU variant",
    "CPU part",
    "Features",
)


def programs_folder() -> Path:
    """Return the folder of the user's cache for programs that run on this kind of processor."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home, "recall_jax", "xla", processor_kind()).expanduser()


def processor_kind(description: Path = Path("/proc/cpuinfo")) -> str:
    """Return a name that only processors share which run each other's compiled programs.

    XLA compiles for the instructions of the processor at hand: on a processor that lacks one of
    them, the program aborts. Hence the name is drawn from the model and the instructions of every
    processor in Linux's description, and from the version of jaxlib, the compiler. Where there is
    no such file, the machine's and the processor's names are all that is known.
    """
    known = {f"jaxlib {version('jaxlib')}", platform.machine(), platform.processor()}
    if description.exists():
        lines = (line.partition(":") for line in description.read_text().splitlines())
        known |= {f"{name.strip()}:{value}" for name, _, value in lines if name.strip() in _KIND}
    return hashlib.sha256("\n".join(sorted(known)).encode()).hexdigest()[:16]
