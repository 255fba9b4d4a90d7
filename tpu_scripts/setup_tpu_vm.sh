#!/usr/bin/env bash
# Installs recall with JAX for TPU on all workers, in ~/recall; again after a change of the project.
#   TPU_NAME            a TPU VM that is ready
#   ZONE                its zone
# Optional: PROJECT, DRY_RUN=1,
#   NFS_SHARE           HOST:/SHARE of a Filestore, mounted on all workers at /mnt/recall: a folder for
#                       OUT that all workers see and that outlives them
#   COPY                a file or folder here that is copied to every worker's home, such as a recipe
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"
require TPU_NAME ZONE

wheels=WHEELS # in a dry run there are none
if ! dry; then
    wheels=$(mktemp -d)
    trap 'rm -rf "$wheels"' EXIT
fi
run python3 -m pip wheel --quiet --no-deps --wheel-dir "$wheels" "$(dirname "$here")"

on_all() { # COMMAND: a line of shell, run by every worker
    tpu tpu-vm ssh "$TPU_NAME" --worker=all --command="$1"
    run "${words[@]}"
}

to_all() { # SOURCE DESTINATION
    tpu tpu-vm scp --recurse "$1" "$TPU_NAME:$2" --worker=all
    run "${words[@]}"
}

on_all 'rm -rf recall_wheels'
to_all "$wheels" recall_wheels
# The images bring Python 3.10; uv brings one that is new enough.
on_all 'python3 -m pip install --quiet --user uv'
on_all '.local/bin/uv venv --quiet --allow-existing --python 3.12 recall'
on_all '.local/bin/uv pip install --quiet --python recall/bin/python --reinstall-package recall-jax recall_wheels/*.whl "jax[tpu]"'
if [[ -n ${NFS_SHARE:-} ]]; then
    on_all 'command -v mount.nfs >/dev/null || sudo apt-get install --yes --quiet nfs-common'
    on_all "mountpoint -q /mnt/recall || { sudo mkdir -p /mnt/recall && sudo mount -t nfs $(quoted "$NFS_SHARE") /mnt/recall && sudo chmod 1777 /mnt/recall; }"
fi
[[ -z ${COPY:-} ]] || to_all "$COPY" .
