# Sourced by study.sh, ast.sh and smollm2.sh: runs in the background, JOBS at a time, each of which leaves a file.
[[ ${JOBS:-1} =~ ^[1-9][0-9]*$ ]] || { echo "error: JOBS=$JOBS is no number of runs at a time" >&2; exit 2; }
measured=()  # the files
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
trap 'echo "interrupted: the same command goes on from what has been saved" >&2; exit 130' INT
is_there() { [ -f "$1" ] && echo "$1 is there"; }
wait_for_room() { while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-1}" ]; do sleep 0.2; done; }
start() {  # FILE COMMAND...: run it with --json FILE, unless that is there
    if is_there "$1"; then return; fi
    wait_for_room
    "${@:2}" --json "$1" &
    measured+=("$1")
}
check_measured() {  # with an error if a run had one
    local json
    for json in ${measured[@]+"${measured[@]}"}; do
        [ -f "$json" ] || { echo "error: $json could not be measured, its run says why" >&2; exit 1; }
    done
}
