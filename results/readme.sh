#!/usr/bin/env bash
# README.md's tables and pictures of tiny, two runs at a time (about an hour on two cores). What has its file is not
# measured again; all from scratch, of which what results/README.md alone shows is lost:
#     rm -r results/tiny results/ast-[!d]*.json && bash results/readme.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export JOBS=${JOBS:-2} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
bash results/study.sh tiny readme
bash results/ast.sh readme
bash results/models.sh
python results/readme.py
