#!/usr/bin/env bash
# Waits in the queue for a TPU VM, sets it up, and runs a command on all its workers; after a
# preemption all of that again, until the command has ended by itself.
#   queued_resource.sh recall merge recipe.yml /mnt/recall/merged --distributed --resume
#   QUEUED_RESOURCE     name of the request
#   TPU_NAME            name of the TPU VM
#   ZONE                such as us-west4-a
#   ACCELERATOR_TYPE    such as v5litepod-16, v5p-32 or v6e-16
#   RUNTIME_VERSION     such as v2-alpha-tpuv5-lite, v2-alpha-tpuv5 or v2-alpha-tpuv6e
# Optional: PROJECT, SPOT=1, NFS_SHARE, COPY and FOLDER as in the scripts it calls,
#   POLL_SECONDS (60), KEEP=1 (do not give the TPU VM back at the end), DRY_RUN=1.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"
require QUEUED_RESOURCE TPU_NAME ZONE ACCELERATOR_TYPE RUNTIME_VERSION
if (($# == 0)); then
    echo "${0##*/}: name a command, such as: recall merge RECIPE OUT --distributed --resume" >&2
    exit 2
fi

ask_state() {
    tpu queued-resources describe "$QUEUED_RESOURCE" --format='value(state.state)'
    query state "${words[@]}"
}

create() {
    tpu queued-resources create "$QUEUED_RESOURCE" --node-id="$TPU_NAME" \
        --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION"
    [[ ${SPOT:-0} != 1 ]] || words+=(--spot)
    run "${words[@]}"
}

delete() { # the request, and the TPU VM if there is one
    tpu queued-resources delete "$QUEUED_RESOURCE" --force --quiet
    run "${words[@]}"
}

state=
while true; do
    ask_state
    [[ -n $state ]] || create
    while ! dry && [[ $state != ACTIVE && $state != SUSPENDED && $state != FAILED ]]; do
        sleep "${POLL_SECONDS:-60}"
        ask_state
    done
    if [[ $state == FAILED ]]; then
        echo "${0##*/}: the request $QUEUED_RESOURCE failed; delete it, and see what it says" >&2
        exit 1
    fi
    if [[ $state != SUSPENDED ]]; then
        status=0
        { "$here/setup_tpu_vm.sh" && "$here/run_on_all_workers.sh" "$@"; } || status=$?
        # A command that fails on workers that are still there has a reason of its own; that they
        # were preempted is known a little later.
        ((status == 0)) || sleep "${POLL_SECONDS:-60}"
        ask_state
        if ((status == 0)) || [[ $state == ACTIVE ]]; then
            break
        fi
    fi
    echo "${0##*/}: $TPU_NAME was preempted; it is asked for again" >&2
    delete
done
[[ ${KEEP:-0} == 1 ]] || delete
exit "$status"
