# shellcheck shell=bash disable=SC2154,SC2034  # tpu_vm.sh reads this file; they share variables
# How tpu_vm.sh talks to gcloud: commands, states, and the way to VMs that are ready to train. Queued resources of the
# TPU API; tpu_vm_compute.sh has another state, create_vms, destroy, on_workers and copy_to_all, for Compute Engine.
exec 3>&1
export LC_ALL=C
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
interrupted() {
  # shellcheck disable=SC2046  # a word for each: of several VMs each has an ssh
  kill $(jobs -p) 2>/dev/null || true
  say "detached; the run goes on, and so does what it costs: $0 logs|stop|delete $name"
  exit 130
}
trap interrupted INT TERM
patience=1        # questions without an answer before giving up: one at first, as nobody may be logged in
pretended=ACTIVE  # the resource's state in a dry run

ask() {  # answer in a dry run, command...: runs the command, or prints it and gives the answer
  local answer=$1 line
  shift
  if [ -z "$dry" ]; then
    "$@"
  else
    printf -v line ' %q' "$@"
    echo "${line:1}" >&3
    printf '%s' "$answer"
  fi
}
resources() { ask '' gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }
on_workers() {  # which of them, answer in a dry run, words of the command, quoted for the shell there
  ask "$2" gcloud compute tpus queued-resources ssh "$name" "${where[@]}" --node="$1" --worker="$1" \
    ${ssh_flags[@]+"${ssh_flags[@]}"} --command="bash tpu_vm_worker.sh$(printf ' %q' "${@:3}")"
}
copy_to_all() {  # files...
  ask '' gcloud compute tpus queued-resources scp "$@" "$name:" "${where[@]}" --node=all --worker=all \
    ${ssh_flags[@]+"${ssh_flags[@]}"}
}
create_vms() {
  resources create "${shape[@]}" --accelerator-type="$accelerator" --runtime-version="$runtime" \
    ${create_flags[@]+"${create_flags[@]}"}
}
destroy() { resources delete --force; }

state_of() {  # answer in a dry run, field, what to describe: "absent" if it does not exist
  local tries
  for ((tries = 1; ; tries++)); do
    ask "$1" gcloud compute tpus "${@:3}" "${where[@]}" --format="value($2)" 2>"$errors" && return
    if grep -q NOT_FOUND "$errors"; then echo absent && return; fi
    cat "$errors" >&2
    [ "$tries" -lt "$patience" ] || return 1
    sleep "$poll"
  done
}

state() {  # of the resource; of an active one with a node that is not ready: NODE_ and the state of that
  local current node
  current=$(state_of "$pretended" state.state queued-resources describe "$name") || return 1
  if [ "$current" = ACTIVE ]; then
    for node in "${nodes[@]}"; do
      current=$(state_of READY state tpu-vm describe "$node") || return 1
      if [ "$current" != READY ]; then echo "NODE_$current" && return; fi
    done
    current=ACTIVE
  fi
  echo "$current"
}

acquire() {  # waits for the VMs, after asking for them where that has to be
  local current='' before failures=0
  while true; do
    before=$current
    current=$(state) || exit 1
    patience=20
    if [ "$current" != "$before" ]; then say "$name is $current"; fi
    case "$current" in
      ACTIVE) return ;;
      absent)
        pretended=ACTIVE
        create_vms || failures=$((failures + 1))
        ;;
      FAILED | SUSPENDED | NODE_PREEMPTED | NODE_TERMINATED | NODE_absent)
        if [ "$current" = FAILED ]; then failures=$((failures + 1)); fi
        destroy
        ;;
    esac
    if [ "$failures" -ge "$max_crashes" ]; then say "creating it has failed $failures times" && exit 1; fi
    if [ -z "$dry" ]; then sleep "$poll"; fi
  done
}

install() {
  local files=("$root/launch/tpu_vm_worker.sh") archive=$root/build/$name/lmboost.tgz
  if [[ "$source" = *.whl ]]; then
    files+=("$source")
  elif [ -z "$source" ]; then
    ask '' mkdir -p "${archive%/*}" && ask '' tar -czf "$archive" -C "$root" --exclude=__pycache__ \
      lmboost configs launch requirements.txt setup.py pyproject.toml README.md || return 1
    files+=("$archive")
  fi
  copy_to_all "${files[@]}" || return 1
  local what=$source
  if [[ "$source" = *.whl ]]; then what=${source##*/}; fi
  on_workers all '' install ${what:+"$what"} || return 1
  if [ -n "$setup" ]; then on_workers all '' setup "$setup" || return 1; fi
}

reach() {  # command...: again and again while the VMs are there; sets status if it is of no use
  local tries
  for ((tries = 0; tries < 20; tries++)); do
    "$@" && return
    status=gone
    [ "$(state)" = ACTIVE ] || return 1
    say "no connection to $name; again in $poll s"
    sleep "$poll"
  done
  status=255
  return 1
}
