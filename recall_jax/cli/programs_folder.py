"""Find the folder for compiled programs, one for each kind of processor."""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

# Fields of Linux's /proc/cpuinfo on x86 and on ARM that distinguish kinds of processors.
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
    """Return a name shared only by processors that can run each other's compiled programs.

    XLA compiles for the instructions of the current processor: on a processor that lacks one of
    them, the program aborts. Hence the name is a hash of the model and the instructions of every
    processor in Linux's description, and of the version of jaxlib, the compiler. Without that file
    it is a hash of the machine's and the processor's names.
    """
    known = {f"jaxlib {version('jaxlib')}", platform.machine(), platform.processor()}
    if description.exists():
        lines = (line.partition(":") for line in description.read_text().splitlines())
        known |= {f"{name.strip()}:{value}" for name, _, value in lines if name.strip() in _KIND}
    return hashlib.sha256("\n".join(sorted(known)).encode()).hexdigest()[:16]
