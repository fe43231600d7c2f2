#!/usr/bin/env bash
#SBATCH --job-name=lmboost
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Trains on a Slurm cluster with GPUs, and goes on after preemptions, time limits, hangs and crashes.
#
#   sbatch --nodes=4 launch/slurm.sh --config=configs/salt_2p8b.py --config.data.train=data/corpus --workdir=runs/large
#
# Flags of sbatch before the script change the lines above; those after it go to training. To be started in the checkout
# with the Python environment active (or PYTHON=...); the workdir and the data are on a file system that all nodes see.
# --dry-run, or DRY_RUN=1, prints the command and runs nothing. MAX_CRASHES=3 is how many crashes in a row without a new
# checkpoint are too many.
#
# One task per GPU, as jax understands Slurm: a process takes the GPU with the number of its task on the node. So each
# task has to see all GPUs of its node: --ntasks-per-node equals --gpus-per-node, and tasks are not bound to GPUs.
#
# The restart rule is that of launch/local.py: 0 and 2 are the end; 75 and 76 requeue the job; anything else is a crash,
# which requeues it, too, but not without end. 180 seconds before the time limit training gets SIGTERM, saves and ends
# with 75. A job that was cancelled is not requeued. The status of all tasks is 2 if one ended with 2, else that of the
# first to fail: srun itself would give the highest, and it is 143 for those that it ended because of the first.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

config='' workdir='' dry=${DRY_RUN:-} flags=()
for flag in "$@"; do
  case "$flag" in
    --help) sed -n '/^# Trains/,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;;
    --dry-run) dry=1 && continue ;;
    --config=*) config=${flag#*=} ;;
    --workdir=*) workdir=${flag#*=} ;;
    --coordinator=* | --num_processes=* | --process_id=* | --multihost)
      fail "$flag: the launcher gives this flag itself; leave it out"
      ;;
  esac
  flags+=("$flag")
done
[ -n "$config" ] || fail "--config is missing, such as --config=configs/salt_2p8b.py"
[ -n "$workdir" ] || fail "--workdir is missing, such as --workdir=runs/large"
max_crashes=${MAX_CRASHES:-3}
[[ "$max_crashes" =~ ^[1-9][0-9]*$ ]] || fail "MAX_CRASHES=$max_crashes: expected a number of 1 or more"

# What the job remembers over its restarts: the crashes of the row, how each task has ended.
notes=$workdir/lmboost-slurm-${SLURM_JOB_ID:-0}
if [[ "$workdir" = *://* ]]; then notes=lmboost-slurm-${SLURM_JOB_ID:-0}; fi
# SIGTERM reaches the shell around a task, too, which has to outlive it.
# shellcheck disable=SC2016  # expanded by the task's shell
task='trap : TERM
"${@:2}"
status=$?
echo "$status $(date +%s.%N)" >"$1/task-$SLURM_PROCID"
exit $status'
command=(srun --kill-on-bad-exit=1 --gpu-bind=none --label bash -c "$task" task "$notes"
  "${PYTHON:-python}" -m lmboost.train --multihost "${flags[@]}")
if [ -n "$dry" ]; then
  printf "'%s' " "${command[@]//\'/\'\\\'\'}"
  echo
  exit 0
fi
[ -n "${SLURM_JOB_ID:-}" ] || fail "there is no Slurm job here: sbatch launch/slurm.sh ..."

newest_checkpoint() {  # step, -1 if there is none; places as lmboost/checkpoint.py's Run has them
  local names=''
  if [[ "$workdir" = *://* ]]; then
    names=$(gcloud storage ls "${workdir%/}/checkpoints/" | sed 's,/$,,;s,.*/,,') || true
  elif [ -d "$workdir/checkpoints" ]; then
    names=$(ls "$workdir/checkpoints")
  fi
  names=$(grep -xE '[0-9]+' <<<"$names" | sort -n | tail -n 1) || true
  echo "${names:--1}"
}

forget() {  # removes what stands in the notes, and nothing that is not this job's
  rm -f "$notes"/task-* "$notes/crashes"
  rmdir "$notes" || true
}

mkdir -p "$notes"
rm -f "$notes"/task-*
if [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then echo "0 $(newest_checkpoint)" >"$notes/crashes"; fi
status=0
"${command[@]}" || status=$?
ends=$(cat "$notes"/task-* 2>/dev/null | sort -k2n) || true
if grep -q '^2 ' <<<"$ends"; then
  status=2
elif [ "$status" -ne 0 ]; then
  status=$(awk -v all="$status" '$1 { print $1; seen = 1; exit } END { if (!seen) print all }' <<<"$ends")
fi

case "$status" in
  0 | 2) forget && exit "$status" ;;
  75) why=preempted ;;
  76) why=hung ;;
  *)
    read -r crashes best <"$notes/crashes"
    newest=$(newest_checkpoint)
    if [ "$newest" -gt "$best" ]; then crashes=0; fi
    crashes=$((crashes + 1))
    echo "$crashes $newest" >"$notes/crashes"
    why="crashed with status $status, $crashes of $max_crashes in a row; newest checkpoint: $newest"
    if [ "$crashes" -ge "$max_crashes" ]; then
      echo "launch: $why" >&2
      forget
      exit "$status"
    fi
    ;;
esac
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
if [ "$state" != RUNNING ]; then
  echo "launch: $why; not requeued, as the job is $state" >&2
  exit "$status"
fi
echo "launch: $why; requeued" >&2
scontrol requeue "$SLURM_JOB_ID"
