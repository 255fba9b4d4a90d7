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
    cksum <"$work/$2/model.safetensors" | cut -d' ' -f1
}

one=$(merge 1 one)
echo "1 device: output crc $one"
many=$(merge "$devices" many)
echo "$devices devices: output crc $many"
if [[ $one != "$many" ]]; then
    echo "simulate_pod: $devices devices differ from 1 device" >&2
    exit 1
fi
echo "simulate_pod: $devices devices equal to 1 device"
