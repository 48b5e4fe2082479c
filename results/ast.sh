#!/usr/bin/env bash
# Every number on AST, from scratch (what is measured already is skipped; where a run fails, the others go on):
#     bash results/ast.sh
#     bash results/ast.sh readme                            (the table of README.md alone)
#     JOBS=2 OMP_NUM_THREADS=1 bash results/ast.sh          (two runs at a time: an hour on two cores with bf16, else two)
# Then `python results/readme.py` puts them into README.md and results/README.md.
set -euo pipefail
only=${1:-}
[ $# -eq 0 ] || [ "$*" = readme ] || { sed -n '2,6s/^# //p' "$0" >&2; exit 2; }
cd "$(dirname "$0")/.."
source results/jobs.sh
run() { start "results/ast-$1.json" python ast_train.py --out "out/ast-$1" "${@:2}"; }
ablate() { run "$1" --methods ast --no-one-shot "${@:2}"; }
longer="--steps 1000 --warmup 50 --decay-steps 250 --save-every 250 --data tiny tiny-code --no-one-shot"
for seed in 0 1 2; do run seed$seed --seed $seed; done  # the first is the default run
for seed in 0 1 2; do run control$seed --seed $seed --methods dense --no-one-shot; done
if [ -z "$only" ]; then
    run long --methods ast-slorb $longer
    run control-long --methods dense $longer
    run control-slow --methods dense --no-one-shot --lr 3e-5
    ablate no-distillation --kl-weight 0
    ablate static-decay --decay-steps 0
    ablate no-decay --decay 0
    ablate fixed-mask --mask-every 0
    ablate wanda --score wanda
    ablate swap-start --start-from swap
    for T in 2 4; do ablate temperature$T --temperature $T; done
    ablate code --data tiny:3 tiny-code:7
    run float32 --no-one-shot --dtype float32
fi
wait
check_measured
[ -n "$only" ] || [ -f results/bench_ast.json ] || python tests/bench_ast.py --json results/bench_ast.json
