#!/usr/bin/env bash
# The pruning tables, AST and compressed models once more at 57 million parameters, for a GPU; what has its file is skipped
# and what was cut off goes on:
#     bash results/gpu.sh
# then `python eval.py --compare results/small/*.json --by-method` and `python eval.py --compare results/small/ast.json
# results/small/speed-*.json` print its tables.
set -euo pipefail
[ $# = 0 ] || { sed -n '2,6s/^# //p' "$0" >&2; exit 2; }
cd "$(dirname "$0")/.."
python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "error: results/gpu.sh needs a GPU")' || exit 2
mkdir -p results/small
[ -d out/small ] || python -m data.train_tiny --hidden-size 640 --layers 12 --packages --steps 1500 --batch 128 --lr 1e-3 \
    --compile --save-every 250 --out out/small --json results/train_small.json
[ -f results/small/ast.json ] || python ast_train.py --model out/small --methods dense ast ast-slorb --out out/ast-small \
    --data tiny:3 tiny-code:7 --eval-data tiny --steps 500 --batch 64 --micro-batch 64 --warmup 25 --decay-steps 125 \
    --json results/small/ast.json

measure() { [ -f "results/small/speed-$1.json" ] || python eval.py --model "$2" --data tiny --speed --json "results/small/speed-$1.json"; }
measure dense out/small
for method in ast ast-slorb; do
    for bits in "" "--bits 8" "--bits 4"; do  # as it is, int8, int4
        name=$method${bits/--bits /-int}
        [ -d "out/small-$name" ] || python sparse_matmul.py --model out/ast-small/$method --out "out/small-$name" $bits
        measure "$name" "out/small-$name"
    done
done
JOBS=${JOBS:-4} bash results/study.sh small out/small tiny  # many short runs: they share the GPU
