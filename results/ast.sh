#!/usr/bin/env bash
# Every number of README's section on AST, from scratch (hours on two CPU cores; what is measured already is skipped):
#     bash results/ast.sh
# Then `python results/readme.py` puts them into README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
run() { [ -f "results/ast-$1.json" ] || python ast_train.py --out "out/ast-$1" --json "results/ast-$1.json" "${@:2}"; }
ablate() {  # what comes last counts
    run "$1" --methods ast --no-one-shot --start-from swap --steps 300 --warmup 15 --decay-steps 75 --save-every 100 "${@:2}"
}
for seed in 0 1 2; do run seed$seed --seed $seed; done
run control --methods dense --no-one-shot --steps 300 --warmup 15 --save-every 100
run long --steps 4000 --warmup 200 --decay-steps 1000 --save-every 500 --methods ast-slorb --no-one-shot
ablate swap
ablate no-distillation --kl-weight 0
ablate static-decay --decay-steps 0
ablate no-decay --decay 0
ablate fixed-mask --mask-every 0
ablate wanda --score wanda
ablate dense-start --start-from dense
ablate dense-start-slorb --start-from dense --methods ast-slorb
[ -f results/bench_ast.json ] || python tests/bench_ast.py --json results/bench_ast.json
