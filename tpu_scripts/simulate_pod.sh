#!/usr/bin/env bash
# Runs the demo's RECALL merge as a pod of N processes with M CPU devices each, all on this machine
# and into one folder, and holds it to one process with one device.
#   tpu_scripts/simulate_pod.sh [N] [M]     (default 2 and 4; `recall` is taken from PATH)
set -euo pipefail

fail() { # STATUS TEXT
    echo "simulate_pod: $2" >&2
    exit "$1"
}

number='^[1-9][0-9]{0,3}$'
processes=${1:-2} devices=${2:-4}
(($# <= 2)) || fail 2 "usage: simulate_pod.sh [N] [M]"
[[ $processes =~ $number ]] || fail 2 "N must be a whole number from 1 to 9999, not '$processes'"
[[ $devices =~ $number ]] || fail 2 "M must be a whole number from 1 to 9999, not '$devices'"
recall=$(command -v recall) ||
    fail 2 "no recall on PATH: activate its environment, such as .venv/bin"

pids=()
work=$(mktemp -d)
clean() {
    local signal pid
    for signal in TERM KILL; do # a process that waits for another hears no TERM
        ((${#pids[@]})) || break
        kill -s "$signal" "${pids[@]}" 2>/dev/null || true
        for ((pid = 0; pid < 15; pid++)); do
            kill -0 "${pids[@]}" 2>/dev/null || break
            sleep 0.2
        done
    done
    wait "${pids[@]}" 2>/dev/null || true # else bash tells of those that were killed
    rm -rf "$work"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# The interpreter that recall itself runs on knows where the demo's models lie.
python=$(sed -n '1s/^#!//p' "$recall")
demo=$("$python" -c 'import recall_jax.experiments.demo.material as m; print(m.CHECKPOINTS.parent)')
models=("$demo"/checkpoints/{base,reverse,sort,shift})

merge() { # OUT DEVICES OPTION...: begins a merge; what it is in a pod is told by the environment
    JAX_PLATFORMS=cpu XLA_FLAGS="--xla_force_host_platform_device_count=$2" \
        "$recall" quick "${models[@]}" --data "$demo/data/shift.jsonl" --out "$work/$1" \
        --no-compilation-cache --quiet "${@:3}" &
    pids+=($!)
}

await() { # until all that was begun has ended, or the first has failed
    local pid left status
    while ((${#pids[@]})); do
        left=()
        for pid in "${pids[@]}"; do
            if kill -0 "$pid" 2>/dev/null; then
                left+=("$pid")
            else
                status=0
                wait "$pid" || status=$?
                ((status == 0)) || fail "$status" "a process ended with status $status"
            fi
        done
        pids=(${left[@]+"${left[@]}"})
        sleep 0.1
    done
}

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
for ((process = 0; process < processes; process++)); do
    JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$processes JAX_PROCESS_ID=$process \
        merge pod "$devices" --distributed --mesh auto
done
await
merge one 1
await

# Rows are computed apart, and in other batch shapes: the last bit of a weight may differ.
crc=$("$python" - "$work" "$processes" "$devices" <<'PYTHON'
import json
import math
import sys
import zlib
from pathlib import Path

import numpy as np

from recall_jax.checkpoint.folder import open_checkpoint

one, pod = (Path(sys.argv[1], name) for name in ("one", "pod"))
reports = [json.loads((path / "recall_report.json").read_text()) for path in (one, pod)]
if math.prod(reports[1]["memory"]["mesh"].values()) != int(sys.argv[2]) * int(sys.argv[3]):
    sys.exit("simulate_pod: not all devices of all processes took part")
weights = [np.asarray(report["weights"]) for report in reports]
if not (gap := np.abs(weights[0] - weights[1]).max()) <= 1e-6:
    sys.exit(f"simulate_pod: weights differ by {gap:.1e} from those of 1 process")
models = [open_checkpoint(str(path)) for path in (one, pod)]
if models[0].specs.keys() != models[1].specs.keys():
    sys.exit("simulate_pod: the tensors are not those of 1 process")
crc = 0
for name in sorted(models[0].specs):
    stored = [model.read(name) for model in models]
    if stored[0].dtype != stored[1].dtype or stored[0].shape != stored[1].shape:
        sys.exit(f"simulate_pod: {name} is of another dtype or shape than that of 1 process")
    a, b = (array.astype(np.float32) for array in stored)
    step = np.spacing(np.abs(a)) * (65536 if stored[0].dtype.name == "bfloat16" else 1)
    if not (np.abs(a - b) <= step + 4e-7 * np.abs(a).max()).all():
        sys.exit(f"simulate_pod: {name} differs by more than one unit in the last place")
    crc = zlib.crc32(stored[1].tobytes(), crc)
print(crc)
PYTHON
)
for ((process = 0; process < processes; process++)); do
    echo "process $process of $processes: $devices devices, output crc $crc"
done
echo "simulate_pod: $processes processes equal to 1 process"
