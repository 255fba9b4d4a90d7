#!/usr/bin/env bash
# Creates a TPU VM, unless it is there and ready; one that was preempted is deleted and made anew.
#   TPU_NAME            its name
#   ZONE                such as us-west4-a
#   ACCELERATOR_TYPE    such as v5litepod-16, v5p-32 or v6e-16
#   RUNTIME_VERSION     such as v2-alpha-tpuv5-lite, v2-alpha-tpuv5 or v2-alpha-tpuv6e
# Optional: PROJECT (else gcloud's own), SPOT=1 (cheaper, may be preempted), DRY_RUN=1.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"
require TPU_NAME ZONE ACCELERATOR_TYPE RUNTIME_VERSION

state=
tpu tpu-vm describe "$TPU_NAME" --format='value(state)'
query state "${words[@]}"
case $state in
READY)
    echo "$TPU_NAME is there and ready"
    exit
    ;;
PREEMPTED | TERMINATED)
    "$here/delete_tpu_vm.sh"
    ;;
esac
tpu tpu-vm create "$TPU_NAME" --accelerator-type="$ACCELERATOR_TYPE" --version="$RUNTIME_VERSION"
[[ ${SPOT:-0} != 1 ]] || words+=(--spot)
run "${words[@]}"
