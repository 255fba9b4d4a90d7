#!/usr/bin/env bash
# Runs the demo's RECALL merge as one program on several CPU devices, and holds it to one device.
#   tpu_scripts/simulate_pod.sh [DEVICES]     (default 4; `recall` is taken from PATH)
set -euo pipefail

devices=${1:-4}
if ! [[ $devices =~ ^[1-9][0-9]*$ ]]; then
    echo "simulate_pod: DEVICES must be a whole number above 0, not '$devices'" >&2
    exit 2
fi
if ! recall=$(command -v recall); then
    echo "simulate_pod: no recall on PATH: activate its environment, such as .venv/bin" >&2
    exit 2
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The interpreter that recall itself runs on knows where the demo's models lie.
python=$(sed -n '1s/^#!//p' "$recall")
demo=$("$python" -c 'import recall_jax.demo.material as m; print(m.CHECKPOINTS.parent)')
models=("$demo"/checkpoints/{base,reverse,sort,shift})

merge() { # devices out
    JAX_PLATFORMS=cpu XLA_FLAGS="--xla_force_host_platform_device_count=$1" \
        "$recall" quick "${models[@]}" --data "$demo/data/shift.jsonl" --out "$work/$2" \
        --no-compilation-cache --quiet
    echo "$1 devices: output crc $(cksum <"$work/$2/model.safetensors" | cut -d' ' -f1)"
}

merge 1 one
merge "$devices" many
# Rows are computed apart, but in other batch shapes: the last bit of a weight may differ.
"$python" - "$work" <<'PYTHON'
import json
import sys
from pathlib import Path

import numpy as np

from recall_jax.checkpoint.folder import open_checkpoint

one, many = (Path(sys.argv[1], name) for name in ("one", "many"))
weights = [np.asarray(json.loads((p / "recall_report.json").read_text())["weights"]) for p in (one, many)]
if (gap := np.abs(weights[0] - weights[1]).max()) > 1e-6:
    sys.exit(f"simulate_pod: weights differ by {gap:.1e} from those of 1 device")
models = [open_checkpoint(path) for path in (one, many)]
for name in models[0].specs:
    a, b = (model.read(name).astype(np.float32) for model in models)
    step = np.spacing(np.abs(a)) * (65536 if models[0].specs[name].dtype.name == "bfloat16" else 1)
    if (np.abs(a - b) > step + 4e-7 * np.abs(a).max()).any():
        sys.exit(f"simulate_pod: {name} differs by more than one unit in the last place")
PYTHON
echo "simulate_pod: $devices devices equal to 1 device"
