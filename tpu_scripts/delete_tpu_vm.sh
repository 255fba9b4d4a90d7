#!/usr/bin/env bash
# Deletes a TPU VM with its local disks; one that is not there is none to delete.
#   TPU_NAME            its name
#   ZONE                its zone
# Optional: PROJECT, DRY_RUN=1.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
require TPU_NAME ZONE

state=
tpu tpu-vm describe "$TPU_NAME" --format='value(state)'
query state "${words[@]}"
if [[ -z $state ]] && ! dry; then
    echo "$TPU_NAME is not there"
    exit
fi
tpu tpu-vm delete "$TPU_NAME" --quiet
run "${words[@]}"
