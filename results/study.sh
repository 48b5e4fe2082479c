#!/usr/bin/env bash
# Every number of README's pruning tables, from scratch; what has its file already is not measured again.
#     bash results/study.sh tiny                                     (about an hour on two CPU cores)
#     bash results/study.sh stories260K FOLDER TEXT_FILE             (another model, calibrated and measured on a text of yours)
#     bash results/study.sh settings                                 (DSnoT's own settings, on the validation text of tiny)
# then `python eval.py --compare results/tiny/*.json results/stories260K/*.json --by-method --plot assets/dsnot.png` prints the tables and draws the figure.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1
case $name in tiny|settings) model=() ;; *) model=(--model "$2" --calib "$3" --data "$3" --seqlen 256) ;; esac

run() {
    json=results/$name/${amount/:/of}-$1.json
    mkdir -p "results/$name"
    [ -f "$json" ] || python dsnot.py "${model[@]}" $option $amount --out "out/study-$name" --json "$json" "${@:2}"
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
    exit
fi
amounts="0.5 0.6 0.7 2:4"
[ "$name" != tiny ] || amounts+=" 4:8"  # which needs rows that 8 divides
[ "$name" != small ] || amounts+=" 0.8"  # results/gpu.sh's model
for amount in $amounts; do
    case $amount in *:*) option=--pattern ;; *) option=--sparsity ;; esac
    for score in magnitude wanda sparsegpt; do
        run $score --score $score --refine dsnot --compare
        run $score-swap --score $score --refine swap --no-compare
    done
    sign=$([ $option = --pattern ] && echo --sign-check || echo --no-sign-check)  # as the published code has it
    run wanda-published --refine dsnot --refine-layers attn --cycles 50 $sign --no-compare
    run wanda-dsnot-swap --refine dsnot+swap --no-compare
    run wanda-swap-refit --refine swap --refit --no-compare
    run sparsegpt-propagate --score sparsegpt --refine none --propagate --no-compare
    run sparsegpt-refit --score sparsegpt --refine none --refit --no-compare
    run sparsegpt-swap-refit --score sparsegpt --refine swap --refit --no-compare
    if [ $option = --sparsity ]; then
        for allocate in owl sensitivity; do
            run wanda-swap-refit-$allocate --refine swap --refit --no-compare --allocate $allocate
        done
    fi
done
