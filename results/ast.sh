#!/usr/bin/env bash
# Every number of README's section on AST, from scratch (hours on two CPU cores; what is measured already is skipped):
#     bash results/ast.sh
# Then `python results/ast_table.py` prints the tables and draws assets/ast.png.
set -euo pipefail
cd "$(dirname "$0")/.."
run() { [ -f "results/ast-$1.json" ] || python ast_train.py --out "out/ast-$1" --json "results/ast-$1.json" "${@:2}"; }
for seed in 0 1 2; do run seed$seed --seed $seed --methods ast ast-slorb dense; done
run no-distillation --kl-weight 0 --no-one-shot
run static-decay --decay-steps 0 --no-one-shot
run no-decay --decay 0 --no-one-shot
run fixed-mask --mask-every 0 --no-one-shot
run wanda --score wanda --no-one-shot
run dense-start --start dense --no-one-shot
run long --steps 3000 --warmup 150 --decay-steps 750 --no-one-shot
[ -f results/bench_ast.json ] || python tests/bench_ast.py --json results/bench_ast.json
