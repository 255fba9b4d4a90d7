# shellcheck shell=bash
# Sourced by the scripts beside it: what they need of the environment, and how they run a command.

dry() { [[ ${DRY_RUN:-0} == 1 ]]; }

require() { # NAME...: ends with status 2 and one line that names the variables that are not set
    local name missing=()
    for name; do
        [[ -n ${!name:-} ]] || missing+=("$name")
    done
    if ((${#missing[@]})); then
        echo "${0##*/}: set ${missing[*]} (what each is stands at the top of the script)" >&2
        exit 2
    fi
}

quoted() { # WORD...: the words as a shell reads them back, on one line
    local word words=()
    for word; do
        [[ $word =~ ^[a-zA-Z0-9_./:=@%+,-]+$ ]] || word="'${word//"'"/"'\''"}'"
        words+=("$word")
    done
    echo "${words[*]}"
}

run() { # COMMAND...: runs it, or with DRY_RUN=1 prints it
    if dry; then
        quoted "$@"
    else
        "$@"
    fi
}

query() { # NAME COMMAND...: the variable NAME becomes what the command prints, empty where it fails
    local name=$1 answer=
    shift
    if dry; then
        run "$@"
    else
        answer=$("$@" 2>/dev/null) || answer=
    fi
    printf -v "$name" '%s' "$answer"
}

tpu() { # WORD...: the words of a `gcloud compute tpus` command, with zone and project, in `words`
    words=(gcloud compute tpus "$@" --zone="$ZONE")
    [[ -z ${PROJECT:-} ]] || words+=(--project="$PROJECT")
}
