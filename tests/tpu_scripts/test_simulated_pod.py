"""The pod on this machine, run whole: two processes that merge the demo's models."""

import os
import re
import subprocess
import sys
from pathlib import Path

from toys import environment

ROOT = Path(__file__).parents[2]


def test_two_processes_give_what_one_gives(cache, tmp_path):
    kept = environment(cache)
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    done = subprocess.run(
        [ROOT / "tpu_scripts" / "simulate_pod.sh", "2", "2"],
        env=kept | {"PATH": path, "TMPDIR": str(tmp_path)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    first, second, last = done.stdout.splitlines()
    crc = re.fullmatch(r"process 0 of 2: 2 devices, output crc (\d+)", first)[1]
    assert second == f"process 1 of 2: 2 devices, output crc {crc}"
    assert last == "simulate_pod: 2 processes equal to 1 process"
    assert list(tmp_path.iterdir()) == []
