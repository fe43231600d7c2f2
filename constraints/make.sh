#!/usr/bin/env bash
# Writes newest.txt and oldest.txt anew from setup.py: bash constraints/make.sh [PYTHON3.11 [PYTHON3.13]]
# pip says what it would install in an empty environment; nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

resolve() {  # name, Python, what to install...
  local report
  report=$("$2" -m pip install --dry-run --ignore-installed --quiet --report - "${@:3}")
  "$2" -c '
import json, sys
for item in sorted(json.load(sys.stdin)["install"], key=lambda item: item["metadata"]["name"].lower()):
    if item["metadata"]["name"] != "lmboost":
        print("{name}=={version}".format(**item["metadata"]))' <<<"$report" >"constraints/$1.new"
  mv "constraints/$1.new" "constraints/$1"
}
resolve newest.txt "${1:-python3.11}" '.[test,tpu,gpu,gcs,eval,int8,hub,gguf]'
# Without what needs a newer flax (int8), or is not tested with the oldest jax.
resolve oldest.txt "${2:-python3.13}" '.[test,tpu,gcs]' jax==0.7.2 flax==0.11.2
