#!/usr/bin/env bash
# A LLaMA of 135 million parameters that others have trained, pruned and measured on WikiText-2's raw test file.
# MODEL: the folder that `python tests/from_gguf.py` makes. A run whose file is there is not made again, an interrupted
# one goes on. Ten hours on two cores:
#     JOBS=2 OMP_NUM_THREADS=1 bash results/smollm2.sh out/smollm2-135m-instruct out/wikitext2-test.txt
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# = 2 ] || { sed -n '5s/^# */usage: /p' results/smollm2.sh >&2; exit 2; }
[ -f "$1/config.json" ] && [ -f "$2" ] || { echo "error: $1 is no model's folder, or $2 no file" >&2; exit 2; }
model=$1 text=$2 folder=results/smollm2-135m-instruct ours=out/study-smollm2-135m-instruct
mkdir -p "$folder"
source results/jobs.sh
prune() {  # NAME OPTION...
    start "$folder/$1.json" python dsnot.py --model "$model" --calib "$text" --data "$text" --seqlen 1024 --nsamples 32 \
        "${@:2}" --out "$ours/$1"
}
each() {  # NAME OPTION...: at 2:4, 70 and 50 %
    prune "2of4-$1" --pattern 2:4 "${@:2}"
    for sparsity in 0.7 0.5; do prune "$sparsity-$1" --sparsity $sparsity "${@:2}"; done
}
each wanda-swap-refit --refine swap --refit
start "$folder/ast.json" python ast_train.py --model "$model" --data "$text" --eval-data "$text" --seqlen 256 \
    --steps 150 --warmup 10 --decay-steps 50 --save-every 50 --lr 2e-4 --methods ast --start-from swap --no-one-shot \
    --out $ours/ast
each wanda --compare
each sparsegpt --score sparsegpt --refine none
each magnitude --score magnitude --refine none
each sparsegpt-propagate --score sparsegpt --refine none --propagate
each sparsegpt-swap-refit --score sparsegpt --refine swap --refit
each wanda-swap --refine swap
published=(--refine-layers attn --cycles 50)
prune 2of4-wanda-published --pattern 2:4 "${published[@]}"
prune 0.7-wanda-50-attn --sparsity 0.7 "${published[@]}"
prune 2of4-wanda-50-all --pattern 2:4 --cycles 50
prune 0.7-wanda-50-all --sparsity 0.7 --cycles 50
for sparsity in 0.7 0.5; do
    prune $sparsity-wanda-published --sparsity $sparsity "${published[@]}" --no-sign-check
done
for score in wanda sparsegpt; do
    prune 0.7-$score-swap-refit-sensitivity --sparsity 0.7 --score $score --refine swap --refit --allocate sensitivity
done
prune 2of4-wanda-swap-global --pattern 2:4 --refine swap --global-swaps 8
prune 0.7-wanda-swap-global --sparsity 0.7 --refine swap --global-swaps 8
globally=(--score sparsegpt --refine swap --refit --global-swaps 8)
prune 2of4-sparsegpt-swap-refit-global --pattern 2:4 "${globally[@]}"
prune 0.7-sparsegpt-swap-refit-global --sparsity 0.7 "${globally[@]}"
prune 0.7-sparsegpt-swap-refit-sensitivity-global --sparsity 0.7 "${globally[@]}" --allocate sensitivity
wait
check_measured

ours_24=$ours/2of4-wanda-swap-refit
for named in dense:"$model" sparsegpt:$ours/2of4-sparsegpt swap-refit:$ours_24 ast:$ours/ast/ast; do
    start "$folder/text-${named%%:*}.json" python gpt.py --model "${named#*:}" --prompt "The capital of France is" \
        --max-new-tokens 60 --temperature 0
done
for named in sparsegpt:$ours/2of4-sparsegpt start:$ours/ast/start; do  # on what AST is tested on
    start "$folder/test-${named%%:*}.json" python eval.py --model "${named#*:}" --data "$text" --split test --seqlen 256
done
for bits in 8 4; do
    start "$folder/bytes-int$bits.json" python sparse_matmul.py --model $ours_24 --bits $bits --out $ours/int$bits
done
wait
for bits in 8 4; do
    start "$folder/int$bits.json" python eval.py --model $ours/int$bits --data "$text" --split held-out --seqlen 1024
done
wait
check_measured
