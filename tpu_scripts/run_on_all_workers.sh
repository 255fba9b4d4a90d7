#!/usr/bin/env bash
# Runs one command on all workers of a TPU VM at once; its status is that of the command.
#   run_on_all_workers.sh recall merge recipe.yml /mnt/recall/merged --distributed --resume
#   TPU_NAME            a TPU VM that is set up
#   ZONE                its zone
# Optional: PROJECT, DRY_RUN=1, FOLDER (where the command runs; else the home of each worker).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
require TPU_NAME ZONE
if (($# == 0)); then
    echo "${0##*/}: name a command, such as: recall merge RECIPE OUT --distributed --resume" >&2
    exit 2
fi

command=$(quoted "$@")
[[ -z ${FOLDER:-} ]] || command="cd $(quoted "$FOLDER") && $command"
tpu tpu-vm ssh "$TPU_NAME" --worker=all --command="PATH=~/recall/bin:\$PATH; $command"
run "${words[@]}"
