#!/usr/bin/env bash
# The whole idea on one machine: prepares text, trains a small model, then a larger one alone and with its help.
#
#   bash launch/quickstart.sh [DIR]        DIR: where everything is written, runs/quickstart by default
#
# SEED=1 in front gives another seed, PYTHON=... another Python (3.11 or newer). A run that was interrupted goes on
# where it stopped when the line is typed again. In a checkout it makes a virtual environment first; of an installed
# lmboost, bash "$(lmboost where launch)/quickstart.sh", it takes the environment as it is.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
checkout=''
if [ -e "$root/setup.py" ]; then checkout=$root/; fi
out=$(realpath -m "${1:-${checkout}runs/quickstart}")
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: lmboost needs Python 3.11 or newer, and $python is $("$python" --version): set PYTHON=..." >&2
  exit 2
}

extra=""
if [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ]; then extra="[tpu]"; fi
if command -v nvidia-smi >/dev/null; then extra="[gpu]"; fi
if [ -n "$checkout" ]; then
  cd "$root"
  if [ ! -e .venv/installed ]; then
    "$python" -m venv .venv
    .venv/bin/pip install --quiet -e ".$extra"
    touch .venv/installed
  fi
  python=.venv/bin/python
fi

overrides=(--config.seed="${SEED:-0}" --config.data.train="$out/data")
if [ -n "$extra" ]; then  # an accelerator computes in bfloat16
  overrides+=(--config.model.dtype=bfloat16 --config.teacher.dtype=bfloat16)
fi
train() {
  "$python" -m lmboost.train --config="$root/configs/quickstart.py:$1" --workdir="$out/$1" "${@:2}" "${overrides[@]}"
}

"$python" -m lmboost.prepare --source=stdlib --tokenizer=train:2048 --validation_fraction=0.05 --out="$out/data"
train teacher
train plain
train helped --config.teacher.path="$out/teacher"
"$python" -m lmboost.report --baseline="$out/plain" --run="$out/helped" --helper="$out/teacher" --out="$out/report"
