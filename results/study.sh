#!/usr/bin/env bash
# The tables of pruned models. A run whose file is there is not made again: delete results/NAME to measure all anew.
#     bash results/study.sh tiny                       (the model that ships; two hours on two cores by JOBS=2)
#     bash results/study.sh tiny readme                (the rows of README.md alone)
#     bash results/study.sh settings                   (DSnoT's own settings, on the validation text of tiny)
#     bash results/study.sh seeds                      (some rows of tiny by two other seeds)
#     bash results/study.sh NAME FOLDER TEXT           (a model and a text file of yours; results go to results/NAME;
#                                                       windows of 256 tokens, or of SEQLEN=2048)
# JOBS=6 OMP_NUM_THREADS=2 makes six runs at a time, for a machine with room for them.
# `python eval.py --compare results/NAME/*.json --by-method --plot NAME.png` then prints the table and draws it.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:-} only=
usage() { sed -n '2,10s/^# //p' results/study.sh >&2; exit 2; }
case $name:$# in
    tiny:1|settings:1|seeds:1) model=() ;;
    tiny:2) model=() only=$2; [ "$only" = readme ] || usage ;;
    tiny:*|settings:*|seeds:*|*/*) usage ;;
    *:3)
        [ -f "$2/config.json" ] || { echo "error: $2 is no folder of a model: it has no config.json" >&2; exit 2; }
        case $3 in
            tiny|tiny-code|wikitext2|ptb|c4) ;;
            *) [ -f "$3" ] || { echo "error: there is no text file $3" >&2; exit 2; } ;;
        esac
        python - "$@" "${SEQLEN:-256}" << 'END' || exit 2
import glob, json, os, sys
name, *asked = sys.argv[1:]
for file in sorted(glob.glob(f"results/{glob.escape(name)}/[0-9]*.json")):
    with open(file) as f:
        options = json.load(f)["options"]
    if [os.path.realpath(str(options[key])) for key in ("model", "data", "seqlen")] != [*map(os.path.realpath, asked)]:
        sys.exit(f"error: {file} is of another model, text or SEQLEN: choose another NAME")
END
        model=(--model "$2" --calib "$3" --data "$3" --seqlen "${SEQLEN:-256}") ;;
    *) usage ;;
esac
mkdir -p "results/$name"

source results/jobs.sh
run() {
    local row=${amount/:/of}-$1
    local json=results/$name/$row.json
    if is_there "$json"; then return; fi
    wait_for_room
    tidy
    start "$json" python dsnot.py ${model[@]+"${model[@]}"} $option $amount --out "out/study-$name/$row" "${@:2}"
}
tidy() {  # of the models that have been measured
    local folder row
    for folder in "out/study-$name"/*; do
        row=$(basename "$folder" .unrefined)
        [ ! -f "results/$name/$row.json" ] || rm -rf "$folder"
    done
}
finish() {
    wait
    tidy
    check_measured
}

if [ "$name" = settings ]; then
    option=--sparsity
    for amount in 0.5 0.7; do
        run none --split validation --refine none
        for cycles in 3 12 50; do
            for layers in attn all; do
                for sign in sign-check no-sign-check; do
                    run $cycles-$layers-$sign --split validation --no-compare --cycles $cycles --refine-layers $layers --$sign
                done
            done
        done
    done
    finish
    exit
fi
pictured() {  # in README.md's picture of tiny
    for score in magnitude wanda sparsegpt; do run $score --score $score --refine dsnot --compare; done
    for score in wanda sparsegpt; do run $score-swap --score $score --refine swap --no-compare; done
    for score in wanda sparsegpt; do run $score-swap-refit --score $score --refine swap --refit --no-compare; done
    run sparsegpt-propagate --score sparsegpt --refine none --propagate --no-compare
    run wanda-swap-global --refine swap --global-swaps 16 --no-compare
    [ $option = --sparsity ] || return 0
    for score in wanda sparsegpt; do
        run $score-swap-refit-sensitivity --score $score --refine swap --refit --allocate sensitivity --no-compare
    done
    run sparsegpt-swap-refit-sensitivity-global --score sparsegpt --refine swap --refit --allocate sensitivity \
        --global-swaps 16 --no-compare
}
shown() {  # in its tables and its map of layers, too
    sign=$([ $option = --pattern ] && echo --sign-check || echo --no-sign-check)  # as the published code has it
    run wanda-published --refine dsnot --refine-layers attn --cycles 50 $sign --no-compare
    for score in wanda sparsegpt; do
        run $score-swap-refit-global --score $score --refine swap --refit --global-swaps 16 --no-compare
    done
    [ $option = --sparsity ] || return 0
    run wanda-swap-refit-owl --refine swap --refit --allocate owl --no-compare
}
others() {  # in results/README.md
    run magnitude-swap --score magnitude --refine swap --no-compare
    run wanda-dsnot-swap --refine dsnot+swap --no-compare
    run wanda-propagate --refine none --propagate --no-compare
    run wanda-swap-no-propagate --refine swap --no-propagate --no-compare
    run sparsegpt-refit --score sparsegpt --refine none --refit --no-compare
    [ $option = --sparsity ] || return 0
    run wanda-swap-sensitivity --refine swap --allocate sensitivity --no-compare
    run wanda-swap-sensitivity-global --refine swap --allocate sensitivity --global-swaps 16 --no-compare
    run wanda-swap-refit-sensitivity-global --refine swap --refit --allocate sensitivity --global-swaps 16 --no-compare
}
seeded() {  # by another seed
    run seed$seed-wanda --seed $seed --refine none
    run seed$seed-sparsegpt-propagate --seed $seed --score sparsegpt --refine none --propagate --no-compare
    run seed$seed-wanda-swap --seed $seed --refine swap --no-compare
    run seed$seed-wanda-swap-global --seed $seed --refine swap --global-swaps 16 --no-compare
    for score in wanda sparsegpt; do
        run seed$seed-$score-swap-refit --seed $seed --score $score --refine swap --refit --no-compare
    done
    run seed$seed-wanda-swap-refit-global --seed $seed --refine swap --refit --global-swaps 16 --no-compare
}
each() {  # ROWS AMOUNT...: those runs for each amount
    for amount in "${@:2}"; do
        case $amount in *:*) option=--pattern ;; *) option=--sparsity ;; esac
        $1
    done
}
if [ "$name" = seeds ]; then
    for seed in 1 2; do each seeded 2:4 0.7; done
    finish
    exit
fi
each pictured 2:4 0.7 0.5
each shown 2:4 0.7
if [ -z "$only" ]; then
    case $name in
        small) more=(0.8 0.6) ;;  # results/gpu.sh's model
        tiny) more=(0.6 4:8) ;;  # which needs rows that 8 divides
        *) more=(0.6) ;;
    esac
    each pictured "${more[@]}"
    each shown 0.5 "${more[@]}"
    each others 2:4 0.7 0.5 "${more[@]}"
fi
finish
