# Sourced by study.sh and ast.sh: runs in the background, JOBS at a time, each of which leaves a file.
measured=()  # the files
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
trap 'echo "interrupted: the same command goes on from what has been saved" >&2; exit 130' INT
is_there() { [ -f "$1" ] && echo "$1 is there"; }
wait_for_room() { while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-1}" ]; do sleep 0.2; done; }
check_measured() {  # with an error if a run had one
    local json
    for json in ${measured[@]+"${measured[@]}"}; do
        [ -f "$json" ] || { echo "error: $json could not be measured, its run says why" >&2; exit 1; }
    done
}
