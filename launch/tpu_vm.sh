#!/usr/bin/env bash
# Trains on Cloud TPU VMs, and goes on after preemptions, hangs and crashes. They are asked for as a queued resource,
# or, where --machine_type is given, of Compute Engine, which alone has TPU7x.
#
#   launch/tpu_vm.sh up NAME --accelerator=v5litepod-16 --zone=us-west4-a --spot \
#       --config=configs/salt_2p8b.py --config.data.train=/home/me/data --workdir=gs://bucket/run
#
#   up       creates, runs to the end with restarts, deletes        create   creates or reuses the VMs, installs
#   run      starts training, or attaches to it; restarts           logs     shows the output of the first worker
#   stop     training saves and ends with 75, and stays ended       delete   deletes the VMs: ends what they cost
#
#   --accelerator=TYPE     such as v5litepod-16, v5p-128, v6e-256      --slices=N   so many of them (multislice)
#   --runtime_version=V    the VM image; known for v4, v5litepod, v5p, v6e; with --machine_type an image family of
#                          ubuntu-os-accelerator-images, known for tpu7x, ct6e and ct5p
#   --machine_type=TYPE    in place of --accelerator, for all verbs: tpu7x-standard-4t, ct6e-standard-4t. Needs --zone,
#   --topology=T           --project, and for all but logs and stop the chips of the slice, such as 2x2x2
#   --zone=Z --project=P   gcloud's own defaults if left out           --spot       cheaper, may be preempted
#   --source=URL@REF       clones this instead of copying this checkout; or FILE.whl, a wheel that is copied
#   --setup=CMD            runs on all workers after the install, to copy the data for example
#   --create_flag=F --ssh_flag=F   one more flag for `queued-resources create` (with --machine_type:
#                          `instance-templates create`), or for ssh and scp; may be repeated
#   --max_crashes=3        gives up after so many crashes in a row without a new checkpoint
#   --grace=300            seconds that workers have to end by themselves when the first worker has ended
#   --poll=30              seconds between questions to gcloud         --keep       `up` does not delete at the end
#   --dry-run              prints the commands of a run without incidents and runs none
#
# --config=..., --config.a.b=..., --workdir=... go to training, and all that comes after --. Ctrl-C detaches: the run
# and what it costs go on. The restart rule is that of launch/local.py: 0 and 2 are the end; 75 (preempted) and 76
# (hung) start again at once; all else is a crash, after which there is a pause. A resource that was preempted or has
# failed is deleted and created again. The status of several workers is 2 if one ended with 2, else that of the first
# to fail.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

say() { echo "launch: $*" >&2; }
fail() {
  echo "error: $*" >&2
  exit 2
}

# ---------------------------------------------------------------------------- what is asked for
verb=${1:-}
case "$verb" in
  up | create | run | logs | stop | delete) ;;
  --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;;
  *) fail "verb '$verb': expected up, create, run, logs, stop or delete" ;;
esac
name=${2:-}
[[ "$name" =~ ^[a-z][a-z0-9-]*$ ]] || fail "name '$name': expected $verb NAME, of small letters, digits and -"
shift 2

accelerator='' machine='' topology='' hosts=1 zone='' project=''
runtime='' source='' setup='' workdir='' config='' slices=1 max_crashes=3 grace=300 poll=30
spot='' keep='' dry='' where=(--quiet) create_flags=() ssh_flags=() train_flags=()
while [ $# -gt 0 ]; do
  value=${1#*=}
  case "$1" in
    --accelerator=*) accelerator=$value ;;
    --machine_type=*) machine=$value ;;
    --topology=*) topology=$value ;;
    --runtime_version=*) runtime=$value ;;
    --zone=*) zone=$value where+=("$1") ;;
    --project=*) project=$value where+=("$1") ;;
    --slices=*) slices=$value ;;
    --source=?*@?* | --source=?*.whl) source=$value ;;
    --setup=*) setup=$value ;;
    --create_flag=*) create_flags+=("$value") ;;
    --ssh_flag=*) ssh_flags+=("$value") ;;
    --max_crashes=*) max_crashes=$value ;;
    --grace=*) grace=$value ;;
    --poll=*) poll=$value ;;
    --spot) spot=1 ;;
    --keep) keep=1 ;;
    --dry-run) dry=1 ;;
    --config=*) config=$value train_flags+=("$1") ;;
    --workdir=*) workdir=${value%/} train_flags+=("$1") ;;
    --config.*=*) train_flags+=("$1") ;;
    --) shift && train_flags+=("$@") && break ;;
    *) fail "flag '$1' is not known (--help shows all); other flags of training go after --" ;;
  esac
  shift
done
for number in "$slices" "$max_crashes"; do
  [[ "$number" =~ ^[1-9][0-9]*$ ]] || fail "'$number': --slices and --max_crashes are numbers of 1 or more"
done
if [ -n "$machine" ]; then
  [ -n "$zone" ] || fail "--zone is missing: --machine_type=$machine needs it"
  [ -n "$project" ] || fail "--project is missing: --machine_type=$machine needs it"
  [ -z "$accelerator" ] || fail "--accelerator=$accelerator and --machine_type=$machine: give one of them"
  [ "$slices" -eq 1 ] || fail "--slices=$slices: with --machine_type there is one slice"
  [[ "$machine" =~ -([1-9][0-9]*)t(-tpu)?$ ]] ||
    fail "--machine_type=$machine: expected CHIPSt at its end, as in tpu7x-standard-4t"
  chips=${BASH_REMATCH[1]}
  if [[ "$verb" != logs && "$verb" != stop ]]; then
    [[ "$topology" =~ ^[1-9][0-9]*x[1-9][0-9]*(x[1-9][0-9]*)?$ ]] ||
      fail "--topology='$topology': expected the chips of the slice, such as 2x2x2"
    hosts=$((${topology//x/*} / chips))
    [ $((hosts * chips)) -eq $((${topology//x/*})) ] ||
      fail "--topology=$topology: no multiple of the $chips chips of a $machine"
  fi
fi
if [[ "$verb" = up || "$verb" = create ]] && [ -n "$machine" ]; then
  case "${runtime:-$machine}" in
    tpu7x-*) runtime=ubuntu-accel-2404-amd64-tpu-tpu7x ;;
    ct6e-* | ct5p-*) runtime=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e ;;
    "$machine") fail "--runtime_version is missing: the VM image for $machine is not known here" ;;
  esac
elif [[ "$verb" = up || "$verb" = create ]]; then
  if [ -n "$spot" ]; then create_flags=(--spot ${create_flags[@]+"${create_flags[@]}"}); fi
  [ -n "$accelerator" ] || fail "--accelerator is missing, such as --accelerator=v5litepod-16"
  case "${runtime:-$accelerator}" in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v4-*) runtime=tpu-ubuntu2204-base ;;
    "$accelerator") fail "--runtime_version is missing: the VM image for $accelerator is not known here" ;;
  esac
fi
if [[ "$verb" = up || "$verb" = create ]]; then
  [[ "$source" != *.whl || -e "$source" ]] || fail "--source=$source: no such file"
  [[ -n "$source" || -e "$root/setup.py" ]] ||
    fail "--source is missing, as this is no checkout: give a wheel of lmboost, FILE.whl, or URL@REF of a repository"
fi
if [[ "$verb" = up || "$verb" = run ]]; then
  [ -n "$config" ] || fail "--config is missing, such as --config=configs/salt_2p8b.py"
  [ -n "$workdir" ] || fail "--workdir is missing, such as --workdir=gs://bucket/run"
  recipe=${config%%:*}
  [[ -n "$source" || "$recipe" = /* || -e "$root/$recipe" || -e "$root/configs/$recipe" ]] ||
    fail "--config=$config: no such file in $root"
  if [ "$verb" = up ] && [ -z "$keep" ] && [[ "$workdir" != gs://* ]]; then
    fail "--workdir=$workdir is on the VM's disk, which \`up\` deletes at the end: give gs://..., or --keep"
  fi
fi
if [[ -n "$spot" && -n "$workdir" && "$workdir" != gs://* ]]; then
  say "a preemption takes the VM's disk, and $workdir with it: --workdir should be gs://..."
fi
nodes=("$name") shape=(--node-id="$name")
if [ "$slices" -gt 1 ]; then
  shape=(--node-count="$slices" --node-prefix="$name") nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi

# ---------------------------------------------------------------------------- the run
# shellcheck source-path=SCRIPTDIR source=tpu_vm_gcloud.sh
. "$root/launch/tpu_vm_gcloud.sh"
if [ -n "$machine" ]; then
  # shellcheck source-path=SCRIPTDIR source=tpu_vm_compute.sh
  . "$root/launch/tpu_vm_compute.sh"
fi

prepare() {  # VMs that are ready to train
  acquire
  until install; do
    if [ "$(state)" = ACTIVE ]; then say "installing, or --setup, has failed" && status=1 && finish; fi
    acquire
  done
}

attempt() {  # runs training once; sets status, "stopped" after `stop`, "gone" if the VMs were taken away
  local replies
  reach on_workers all '' start "${train_flags[@]}" || return 0
  reach on_workers 0 '' follow || return 0
  # gcloud's own status is that of the worker with the lowest number that failed, not of the first that did.
  reach replies_to status "$grace" || return 0
  # Of VMs that are gone there is no reply, and gcloud may not mind.
  if [ "$(state)" != ACTIVE ]; then status=gone && return; fi
  status=$(sort -t' ' -k2n <<<"$replies" | awk -F'[= ]' '$1 == "lmboost_status" { seen = 1
    if ($2 && !first) first = $2; if ($2 == 2) wrong = 1; if ($4) stopped = 1 }
    END { print !seen ? 255 : !first ? 0 : wrong ? 2 : stopped ? "stopped" : first }')
}
replies_to() { replies=$(on_workers all 'lmboost_status=0 0' "$@"); }

newest_checkpoint() {  # step, -1 if there is none; places as lmboost/checkpoint.py's Run has them
  local step
  step=$(
    if [[ "$workdir" = gs://* ]]; then
      ask '' gcloud storage ls "$workdir/checkpoints/" 2>"$errors" || true
    else
      on_workers 0 '' list "$workdir/checkpoints" || true
    fi | sed 's,/$,,;s,.*/,,' | grep -xE '[0-9]+' | sort -n | tail -n 1
  ) || true
  echo "${step:--1}"
}

keep_running() {  # the restart rule; sets status
  local crashes=0 best newest
  best=$(newest_checkpoint)
  while attempt; do
    case "$status" in
      0 | 2) return ;;
      75) say "preempted; starting again" ;;
      76) say "hung; starting again" ;;
      stopped | gone)
        if [[ "$status$verb" = goneup ]]; then say "preempted" && prepare && continue; fi
        say "$name was $status" && status=75 && return
        ;;
      *)
        newest=$(newest_checkpoint)
        if [ "$newest" -gt "$best" ]; then best=$newest crashes=0; fi
        crashes=$((crashes + 1))
        say "crashed with status $status, $crashes of $max_crashes in a row; newest checkpoint: $newest"
        if [ "$crashes" -ge "$max_crashes" ]; then return; fi
        sleep "$poll"
        ;;
    esac
  done
}

finish() {  # deletes what `up` has created, ends with status
  if [[ "$verb$keep" = up ]]; then destroy; else say "$name costs until: $0 delete $name"; fi
  exit "$status"
}

status=0
case "$verb" in
  up)
    pretended=absent
    prepare
    keep_running
    finish
    ;;
  create)
    pretended=absent
    prepare
    finish
    ;;
  run)
    current=$(state) || exit 1
    patience=20
    if [ "$current" != ACTIVE ]; then say "$name is $current: \`up\` or \`create\` first" && exit 1; fi
    keep_running
    finish
    ;;
  logs) on_workers 0 '' follow 100 ;;
  stop) on_workers all '' stop ;;
  delete) destroy ;;
esac
