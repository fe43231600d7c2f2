#!/usr/bin/env bash
# The part of tpu_vm.sh that runs on each TPU VM; tpu_vm.sh copies it there.
#
#   install [SOURCE]    unpacks ~/lmboost.tgz to ~/lmboost, or clones SOURCE=URL@REF there, and installs it; or installs
#                       the wheel SOURCE=FILE.whl, which is in ~, into an environment there
#   setup COMMAND       runs a command of the user's
#   start FLAGS...      starts training with the flags; it goes on when the connection is lost
#   follow [LINES]      prints the log until training ends
#   status SECONDS      waits for the end, ends what still runs after so long;
#                       prints lmboost_status=STATUS TIME [stopped]
#   list DIR            names of what is in a directory
#   stop                asks training to save and end
#
# A run that is on is left alone by install, setup and start.
set -euo pipefail

here=$HOME/lmboost
run=$HOME/lmboost_run
mkdir -p "$run"

running() {
  # The number in the file may be another process's after the VM was restarted.
  [ -e "$run/pid" ] && grep -qs lmboost.train "/proc/$(cat "$run/pid")/cmdline"
}

wait_for_status() {  # seconds
  local left=$1 missing=0
  while [ ! -e "$run/status" ] && [ "$left" -gt 0 ] && [ "$missing" -lt 3 ]; do
    running || missing=$((missing + 1))
    left=$((left - 1))
    sleep 1
  done
}

verb=$1
shift
case "$verb" in
  install | setup | start)
    if running; then
      echo "$HOSTNAME: a run is on; no $verb"
      exit 0
    fi
    ;;&
  install)
    rm -rf "$here.new"
    what=(-e '.[tpu,gcs]')
    if [[ "${1:-}" = *.whl ]]; then
      mkdir "$here.new"
      what=(--reinstall-package lmboost "lmboost[tpu,gcs] @ file://$HOME/$1")
    elif [ $# -gt 0 ]; then
      git clone --quiet "${1%@*}" "$here.new"
      git -C "$here.new" checkout --quiet "${1##*@}"
    else
      mkdir "$here.new"
      tar -xzf "$HOME/lmboost.tgz" -C "$here.new"
    fi
    if [ -d "$here/.venv" ]; then mv "$here/.venv" "$here.new"; fi
    rm -rf "$here"
    mv "$here.new" "$here"
    # The VM's own Python is too old; uv brings one. Newer images allow no other packages than their own in theirs.
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
    cd "$here"
    if [ ! -d .venv ]; then "$HOME/.local/bin/uv" venv --quiet --python 3.12 .venv; fi
    "$HOME/.local/bin/uv" pip install --quiet --python .venv/bin/python "${what[@]}"
    ;;
  setup)
    bash -c "$1"
    ;;
  start)
    rm -f "$run/pid" "$run/status" "$run/stopped"
    : >"$run/log"
    setsid nohup bash "$0" train "$@" </dev/null >/dev/null 2>&1 &
    until [ -e "$run/pid" ]; do sleep 0.1; done
    ;;
  train)  # what `start` leaves running
    cd "$here"
    .venv/bin/python -m lmboost.train --multihost "$@" >"$run/log" 2>&1 &
    echo $! >"$run/pid.new"
    mv "$run/pid.new" "$run/pid"
    status=0
    wait $! || status=$?
    echo "$status $(date +%s.%N)" >"$run/status.new"
    mv "$run/status.new" "$run/status"
    ;;
  follow)
    tail -n "${1:-+1}" -f --pid="$(cat "$run/pid")" "$run/log"
    ;;
  status)
    wait_for_status "$1"
    for signal in TERM KILL; do
      if running; then
        kill -s "$signal" "$(cat "$run/pid")"
        wait_for_status 10
      fi
    done
    # Without a status the VM was restarted under the run: a crash, and the first thing that happened.
    ended=$(cat "$run/status" 2>/dev/null || echo 137 0)
    if [ -e "$run/stopped" ]; then ended+=' stopped'; fi
    echo "lmboost_status=$ended"
    ;;
  list)
    cd "$here"
    if [ -d "$1" ]; then ls "$1"; fi
    ;;
  stop)
    touch "$run/stopped"
    if running; then kill -s TERM "$(cat "$run/pid")"; fi
    ;;
esac
