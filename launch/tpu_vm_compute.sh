# shellcheck shell=bash disable=SC2154,SC2034  # tpu_vm.sh reads this file; they share variables
# The VMs of tpu_vm.sh as Compute Engine has them, in place of what tpu_vm_gcloud.sh does by the TPU API: a managed
# instance group that makes all of its VMs or none, an instance template, and for several hosts a workload policy, which
# says how their chips are connected. All three have the run's name.

compute() { ask '' gcloud compute "$@" --quiet --project="$project"; }
group() {  # answer in a dry run, field: of each VM of the group
  ask "$1" gcloud compute instance-groups managed list-instances "$name" "${where[@]}" --format="value($2)"
}

state() {  # ACTIVE if all VMs run, NODE_PREEMPTED if one has ended, absent, or what they wait for
  local tries states pretend=$pretended
  if [ "$pretend" = ACTIVE ]; then pretend=$(printf 'RUNNING\n%.0s' $(seq "$hosts")); fi
  for ((tries = 1; ; tries++)); do
    if states=$(group "$pretend" instanceStatus 2>"$errors"); then break; fi
    if grep -q 'was not found' "$errors"; then states=absent && break; fi
    cat "$errors" >&2
    [ "$tries" -lt "$patience" ] || return 1
    sleep "$poll"
  done
  case "$states" in
    absent) echo absent ;;
    *STOP* | *TERMINATED* | *SUSPEND* | *DEPROVISIONING* | *REPAIRING*) echo NODE_PREEMPTED ;;
    *) if [ "$(grep -c '^RUNNING$' <<<"$states")" -eq "$hosts" ]; then echo ACTIVE; else echo WAITING; fi ;;
  esac
}

create_vms() {
  if ! make_template || ! make_group; then
    remove_template || true
    return 1
  fi
}
make_template() {
  local model=()
  if [ -n "$spot" ]; then model=(--provisioning-model=SPOT --instance-termination-action=STOP); fi
  compute instance-templates create "$name" --machine-type="$machine" --image-family="$runtime" \
    --image-project=ubuntu-os-accelerator-images --maintenance-policy=TERMINATE --boot-disk-size=200GB \
    --scopes=cloud-platform ${model[@]+"${model[@]}"} ${create_flags[@]+"${create_flags[@]}"} || return 1
  [ "$hosts" -eq 1 ] || compute resource-policies create workload-policy "$name" --region="${zone%-*}" \
    --type=HIGH_THROUGHPUT --accelerator-topology="$topology"
}
make_group() {
  local policy=()
  # Its name alone is not enough here.
  if [ "$hosts" -gt 1 ]; then
    policy=(--workload-policy="projects/$project/regions/${zone%-*}/resourcePolicies/$name")
  fi
  compute instance-groups managed create "$name" --zone="$zone" --template="$name" --size="$hosts" \
    --target-size-policy-mode=bulk --default-action-on-vm-failure=do-nothing ${policy[@]+"${policy[@]}"}
}
remove_template() {
  if [ "$hosts" -gt 1 ]; then compute resource-policies delete "$name" --region="${zone%-*}" || true; fi
  compute instance-templates delete "$name"
}
destroy() {
  compute instance-groups managed delete "$name" --zone="$zone"
  remove_template
}

# Which VM is the first process is only known to them, so the logs of all are followed; the others say little.
on_workers() {  # which of them, answer in a dry run, words of the command, quoted for the shell there
  local command
  command=--command="bash tpu_vm_worker.sh$(printf ' %q' "${@:3}")"
  on_each "$1$3" ask "$2" gcloud compute ssh VM "${where[@]}" ${ssh_flags[@]+"${ssh_flags[@]}"} "$command"
}
copy_to_all() {  # files...; a VM that runs does not listen yet
  local tries
  for ((tries = 0; tries < 10; tries++)); do
    on_each all ask '' gcloud compute scp "$@" VM: "${where[@]}" ${ssh_flags[@]+"${ssh_flags[@]}"} && return
    [ "$(state)" = ACTIVE ] || return 1
    sleep "$poll"
  done
  return 1
}

on_each() {  # which, command...: with the name for VM or VM:, at once on all of them; the status of the first to fail
  local names word vms=() pids=() status=0 code i
  names=$(group "$(printf "$name-%s\n" $(seq 0 $((hosts - 1))))" name) || return 1
  read -ra vms <<<"$(sort <<<"$names" | tr '\n' ' ')"
  [ "${#vms[@]}" -gt 0 ] || return 1
  case "$1" in all* | 0follow) ;; *) vms=("${vms[0]}") ;; esac
  for i in "${!vms[@]}"; do
    local words=("${@:2}")
    for word in "${!words[@]}"; do
      case "${words[word]}" in VM | VM:) words[word]=${words[word]/VM/${vms[i]}} ;; esac
    done
    # A log is shown as it comes, all else one VM after the other.
    if [ "$1" = 0follow ]; then "${words[@]}" & else "${words[@]}" >"$errors.$i" & fi
    pids+=($!)
  done
  for i in "${!vms[@]}"; do
    code=0
    wait "${pids[i]}" || code=$?
    if [ "$status" -eq 0 ]; then status=$code; fi
    if [ "$1" != 0follow ]; then cat "$errors.$i" && rm -f "$errors.$i"; fi
  done
  return "$status"
}
