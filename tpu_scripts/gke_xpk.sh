#!/usr/bin/env bash
# The same on Google Kubernetes Engine, by xpk (github.com/AI-Hypercomputer/xpk):
#   gke_xpk.sh create                 a cluster with one slice, or what of it is missing
#   gke_xpk.sh run recall merge /mnt/recall/recipe.yml /mnt/recall/merged --distributed --resume
#   gke_xpk.sh delete                 the workload; with CLUSTER_TOO=1 the cluster too
#   CLUSTER             name of the cluster
#   ZONE                such as us-west4-a
#   PROJECT             the project
#   TPU_TYPE            such as v5litepod-16, v5p-32 or v6e-16
#   WORKLOAD            name of the workload (run, delete)
#   IMAGE               container image with recall and jax[tpu] (run)
# Optional: SPOT=1 (create), MAX_RESTARTS (run; 50), DRY_RUN=1. A folder that all workers see is
# attached to the cluster once, by `xpk storage attach`.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
action=${1:-}
shift || true
in_cluster() { # WORD...: the words of an xpk command, in `words`
    words=(xpk "$@" --cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT")
}

case $action in
create)
    require CLUSTER ZONE PROJECT TPU_TYPE
    in_cluster cluster create --tpu-type="$TPU_TYPE" --num-slices=1
    if [[ ${SPOT:-0} == 1 ]]; then words+=(--spot); else words+=(--on-demand); fi
    run "${words[@]}"
    ;;
run)
    require CLUSTER ZONE PROJECT TPU_TYPE WORKLOAD IMAGE
    if (($# == 0)); then
        echo "${0##*/}: name a command, such as: recall merge RECIPE OUT --distributed --resume" >&2
        exit 2
    fi
    in_cluster workload create --workload="$WORKLOAD" --tpu-type="$TPU_TYPE" --num-slices=1 \
        --docker-image="$IMAGE" --max-restarts="${MAX_RESTARTS:-50}" --command="$(quoted "$@")"
    run "${words[@]}"
    ;;
delete)
    require CLUSTER ZONE PROJECT WORKLOAD
    in_cluster workload delete --workload="$WORKLOAD"
    run "${words[@]}"
    if [[ ${CLUSTER_TOO:-0} == 1 ]]; then
        in_cluster cluster delete
        run "${words[@]}"
    fi
    ;;
*)
    echo "${0##*/}: say create, run COMMAND... or delete, not '$action'" >&2
    exit 2
    ;;
esac
