#!/usr/bin/env bash
# README.md's tables and pictures of tiny, two runs at a time. What study.sh and ast.sh have measured is not measured
# again. From scratch, in less than an hour on two cores with bf16, else in an hour and a half (what results/README.md
# alone shows of the pruned tiny is lost):
#     rm -rf results/tiny results/ast-seed*.json results/ast-control[0-2].json out/ast-* out/models
#     bash results/readme.sh
set -euo pipefail
[ $# = 0 ] || { sed -n '2,6s/^# //p' "$0" >&2; exit 2; }
cd "$(dirname "$0")/.."
export JOBS=${JOBS:-2} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
bash results/study.sh tiny readme
bash results/ast.sh readme
bash results/models.sh
python results/readme.py
