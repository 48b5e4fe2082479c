#!/usr/bin/env bash
# What README's first command prints, the sizes and perplexities of compressed models, and the texts that models write
# (ten minutes on two CPU cores), in place of those that results/ has (`git checkout results` brings them back):
#     bash results/models.sh
# AST's text needs the model of python ast_train.py --out out/ast-seed0. Then `python results/readme.py` puts them into
# README.md.
set -euo pipefail
[ $# = 0 ] || { sed -n '2,6s/^# //p' "$0" >&2; exit 2; }
cd "$(dirname "$0")/.."
rm -rf out/models
write() { python gpt.py --model "$2" --prompt "Help on module json" --max-new-tokens 60 --json "results/text-$1.json"; }
compress() {
    python sparse_matmul.py --model out/models/2of4 "${@:2}" --out "out/models/$1" --json "results/sparse-bytes-$1.json"
    python eval.py --model "out/models/$1" --data tiny --json "results/sparse-tiny-$1.json"
}
python eval.py --json results/sparse-tiny-dense.json
python dsnot.py --pattern 2:4 --refine swap --refit --no-compare --out out/models/2of4
python eval.py --model out/models/2of4 --data tiny --json results/sparse-tiny-2of4.json
compress bf16
compress int8 --bits 8
compress int4 --bits 4
python dsnot.py --refine swap --refit --out out/models/70 --json results/quick-start.json | tee results/quick-start.txt
write dense tiny
write 70 out/models/70
write 2of4 out/models/2of4
if [ -d out/ast-seed0/ast ]; then
    write ast out/ast-seed0/ast
else
    echo "AST's text stays as it is: first train its model by python ast_train.py --out out/ast-seed0"
fi
