#!/usr/bin/env bash
# Runs nash-jax on a TPU slice of Google Cloud; docs/tpu.md is the walkthrough.
set -euo pipefail
shopt -s inherit_errexit # a failed gcloud query must not pass as an empty answer

usage() {
  cat <<'EOF'
usage: launch/tpu.sh COMMAND [OPTION ...] [-- JOB --config=NAME --workdir=gs://BUCKET/RUN ...]

commands
  create   request the slice: as a queued resource, or immediately with --node
  wait     wait until the slice is ready
  install  copy this checkout's last commit to every worker and install it there
  each     run the command after -- on every worker, in the checkout
  start    run `nash-jax` with the arguments after -- on every worker
  logs     follow the log of worker 0 (or --worker=N, or --worker=all)
  status   show the state of the slice and of every worker's program
  resume   after a preemption, do what is needed of delete, create, wait, install and start;
           status 2: the program or this script refused its input, and would do so again
  stop     make every worker's program save and end
  delete   release the slice

options
  --project=ID      or the variable TPU_PROJECT; required
  --zone=ZONE       or the variable TPU_ZONE; required
  --name=NAME       name of the slice [nash-jax]
  --type=TYPE       accelerator type [v5litepod-16]
  --runtime=IMAGE   software version of the workers [the one for the type]
  --node            no queue: a node of your own, or an error if none is free. Give it to every command
  --spot            cheaper, but may be preempted
  --worker=N|all    worker whose log to follow [0]
  --setup=COMMAND   install, resume: a shell command to run in the checkout of every worker after
                    installing, such as the copy of weights and prompts from a bucket
  --dry-run         print every command instead of running it

example
  launch/tpu.sh start -- train --config=stories --workdir=gs://my-bucket/runs/first
EOF
}

fail() {
  printf 'launch/tpu.sh: %s\n' "$1" >&2
  exit 2
}

run() {
  if [[ -n $dry_run ]]; then
    printf '+'
    printf ' %q' "$@"
    printf '\n'
  else
    "$@"
  fi
}

parse() {
  command=$1
  shift
  project=${TPU_PROJECT-} zone=${TPU_ZONE-} name=nash-jax type=v5litepod-16 runtime=""
  queued=yes spot=() worker=0 setup="" dry_run="" job=()
  while (($#)); do
    case $1 in
      --project=*) project=${1#*=} ;;
      --zone=*) zone=${1#*=} ;;
      --name=*) name=${1#*=} ;;
      --type=*) type=${1#*=} ;;
      --runtime=*) runtime=${1#*=} ;;
      --node) queued="" ;;
      --spot) spot=(--spot) ;;
      --worker=*) worker=${1#*=} ;;
      --setup=*) setup=${1#*=} ;;
      --dry-run) dry_run=yes ;;
      --)
        shift
        job=("$@")
        break
        ;;
      *) fail "unknown option '$1'; launch/tpu.sh --help lists them" ;;
    esac
    shift
  done
  [[ -n $project ]] || fail "no project: give --project=ID, or set TPU_PROJECT"
  [[ -n $zone ]] || fail "no zone: give --zone=ZONE such as us-west4-a, or set TPU_ZONE"
  [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    fail "--name='$name': expected lower-case letters, digits and hyphens, starting with a letter"
  [[ $worker =~ ^([0-9]+|all)$ ]] || fail "--worker='$worker': expected a number or all"
  case $command in
    start | resume) ((${#job[@]})) || fail "$command: expected -- JOB --config=NAME ..." ;;
    each) ((${#job[@]})) || fail "each: expected -- COMMAND ..." ;;
    *) ((!${#job[@]})) || fail "$command: takes nothing after --" ;;
  esac
  where=("--project=$project" "--zone=$zone")
  if [[ -z $runtime ]]; then
    case $type in
      v4-*) runtime=tpu-ubuntu2204-base ;;
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      v5e-*) fail "--type='$type' is the planner's name; Google's is v5litepod-${type#v5e-}" ;;
      *) fail "--type='$type': no runtime known for it; give --runtime=IMAGE" ;;
    esac
  fi
}

create() {
  if [[ -n $queued ]]; then
    run gcloud compute tpus queued-resources create "$name" "${where[@]}" "--node-id=$name" \
      "--accelerator-type=$type" "--runtime-version=$runtime" "${spot[@]}"
  else
    run gcloud compute tpus tpu-vm create "$name" "${where[@]}" \
      "--accelerator-type=$type" "--version=$runtime" "${spot[@]}"
  fi
}

delete() {
  if [[ -n $queued ]]; then
    run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  else
    run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
  fi
}

# Prints the state of the node, or of its request while it has none, or nothing if neither exists. A
# list, unlike describe, distinguishes an absent node from a failed query.
state() {
  local found
  found=$(run gcloud compute tpus tpu-vm list "${where[@]}" \
    "--filter=name~/nodes/$name\$" "--format=value(state)")
  if [[ -n $queued && ( -z $found || -n $dry_run ) ]]; then
    found+=${dry_run:+$'\n'}$(run gcloud compute tpus queued-resources list "${where[@]}" \
      "--filter=name~/queuedResources/$name\$" "--format=value(state.state)")
  fi
  printf '%s\n' "$found"
}

wait_ready() {
  local now last=""
  while :; do
    now=$(state)
    if [[ -n $dry_run ]]; then
      printf '%s\n' "$now"
      return
    fi
    case $now in
      READY) return ;;
      '' | FAILED | SUSPEND* | PREEMPTED | TERMINATED | STOP* | DELETING)
        printf 'launch/tpu.sh: slice %s is %s: it will not become ready; resume creates another\n' \
          "$name" "${now:-absent}" >&2
        exit 1
        ;;
    esac
    [[ $now == "$last" ]] || printf '%s is %s; waiting\n' "$name" "$now"
    last=$now
    sleep "${TPU_POLL_SECONDS:-30}"
  done
}

on() {
  local which=$1
  shift
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$which" "--command=$*"
}

# Prints words quoted for the remote shell.
quoted() {
  printf ' %q' "$@"
}

install() {
  local root packed
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  packed=${TMPDIR:-/tmp}/nash_jax.$$.tar.gz
  if [[ -n $(git -C "$root" status --porcelain) ]]; then
    printf 'launch/tpu.sh: uncommitted changes are not copied\n' >&2
  fi
  run git -C "$root" archive --format=tar.gz --prefix=nash_jax/ "--output=$packed" HEAD
  run gcloud compute tpus tpu-vm scp "$packed" "$name:nash_jax.tar.gz" "${where[@]}" --worker=all
  run rm -f "$packed"
  on all "tar -xzf nash_jax.tar.gz && bash nash_jax/launch/worker.sh install"
  [[ -z $setup ]] || on all "cd nash_jax && $setup"
}

start() {
  on all "bash nash_jax/launch/worker.sh start$(quoted "${job[@]}")"
}

# A program that refused its input would refuse it again.
bad_input() {
  on 0 "tail -n 5 nash_jax/runs/launch/log" >&2
  fail "slice $name: the program refused its input (status 2); its last lines are above. Mend that, then launch/tpu.sh start"
}

resume() {
  local now
  if [[ -n $dry_run ]]; then # show the commands after a preemption
    state
    delete
    create
  else
    now=$(state)
    case $now in
      READY)
        if now=$(on 0 'bash nash_jax/launch/worker.sh state') && [[ $now =~ ^(running|exited 0)$ ]]
        then
          printf '%s: the program is %s\n' "$name" "${now/exited 0/finished}"
          return
        fi
        [[ $now != "exited 2" ]] || bad_input
        ;;
      '') create ;;
      FAILED | SUSPEND* | PREEMPTED | TERMINATED | STOP*)
        printf '%s is %s: creating another\n' "$name" "$now"
        delete
        create
        ;;
    esac
  fi
  wait_ready
  install
  start
}

main() {
  case ${1:---help} in
    -h | --help | help) usage; return ;;
    create | wait | install | each | start | logs | status | resume | stop | delete) ;;
    *) fail "unknown command '$1'; launch/tpu.sh --help lists them" ;;
  esac
  parse "$@"
  [[ -n $dry_run ]] || command -v gcloud >/dev/null ||
    fail "no gcloud on the PATH: install the Google Cloud CLI, or use --dry-run"
  case $command in
    wait) wait_ready ;;
    each) on all "cd nash_jax &&$(quoted "${job[@]}")" ;;
    logs) on "$worker" "tail -n 200 -F nash_jax/runs/launch/log" ;;
    status)
      state
      on all "bash nash_jax/launch/worker.sh state"
      ;;
    stop) on all "bash nash_jax/launch/worker.sh stop" ;;
    *) "$command" ;;
  esac
}

main "$@"
