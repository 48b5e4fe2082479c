#!/usr/bin/env bash
# README.md's tables and pictures of tiny, from scratch (what has its file is not measured again), two runs at a time:
#     bash results/readme.sh                                (about an hour on two cores)
set -euo pipefail
cd "$(dirname "$0")/.."
export JOBS=${JOBS:-2} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
bash results/study.sh tiny readme
bash results/ast.sh readme
bash results/models.sh
python results/readme.py
