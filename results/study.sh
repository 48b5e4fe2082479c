#!/usr/bin/env bash
# Every number of README's pruning tables, from scratch:
#     bash results/study.sh tiny                                     (about 20 minutes on two CPU cores)
#     bash results/study.sh stories260K FOLDER TEXT_FILE             (another model, calibrated and measured on a text of yours)
# then `python eval.py --compare results/dsnot-*.json --by-method --plot assets/dsnot.png` prints the tables and draws the figure.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1
if [ "$name" = tiny ]; then model=(); else model=(--model "$2" --calib "$3" --data "$3" --seqlen 256); fi
for amount in 0.7 0.5 2:4 0.6; do
    case $amount in *:*) option=--pattern ;; *) option=--sparsity ;; esac
    run() { python dsnot.py "${model[@]}" $option $amount --out "out/study-$name" --json "results/dsnot-$name-${amount/:/of}-$1.json" "${@:2}"; }
    for score in magnitude wanda sparsegpt; do
        run $score --score $score --refine dsnot --compare
    done
    run wanda-published --refine dsnot --refine-layers attn --cycles 50 --no-sign-check --no-compare
    run wanda-swap --refine swap --no-compare
    run wanda-swap-refit --refine swap --refit --no-compare
done
