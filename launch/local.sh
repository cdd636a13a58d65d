#!/usr/bin/env bash
# Runs several nash-jax processes on this machine, as several hosts would.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: launch/local.sh N JOB [FLAG ...]

Runs N processes of `nash-jax JOB FLAG ...`, each with one CPU device (two with DEVICES=2
launch/local.sh ...). They find each other through the variables NASH_JAX_COORDINATOR (host:port of
process 0), NASH_JAX_PROCESSES and NASH_JAX_PROCESS_ID. Lines of process i start with [i]. Ctrl-C and
SIGTERM go to all processes. If one fails, the others end within NASH_JAX_HEARTBEAT seconds (100),
and the script exits with its status.

example: launch/local.sh 2 train --config=stories --workdir=runs/two
EOF
}

[[ ${1-} =~ ^(-h|--help|)$ ]] && { usage; exit; }
if ! [[ $1 =~ ^[1-9][0-9]*$ ]] || (($# < 2)); then
  printf 'launch/local.sh: expected a number of processes and a job, got:%s\n' \
    "$(printf ' %q' "$@")" >&2
  exit 2
fi
count=$1
shift

program=$(command -v nash-jax || echo "$(dirname "$0")/../.venv/bin/nash-jax")
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export NASH_JAX_COORDINATOR=127.0.0.1:$port NASH_JAX_PROCESSES=$count
export XLA_FLAGS="${XLA_FLAGS-} --xla_force_host_platform_device_count=${DEVICES:-1}"

declare -A running
for ((i = 0; i < count; i++)); do
  NASH_JAX_PROCESS_ID=$i "$program" "$@" > >(sed -u "s/^/[$i] /") 2>&1 &
  running[$!]=$i
done
stop() { ((!${#running[@]})) || kill -TERM "${!running[@]}" 2>/dev/null || true; }
trap stop INT TERM

status=0
while ((${#running[@]})); do
  code=0 ended=""
  wait -n -p ended "${!running[@]}" || code=$?
  [[ -n ${ended-} ]] || continue # a signal interrupted the wait
  printf '[%s] ended with status %s\n' "${running[$ended]}" "$code"
  unset "running[$ended]"
  if ((code && !status)); then
    status=$code
    # 75 means that the run stopped, on all processes together.
    ((code == 75)) || stop
  fi
done
exit "$status"
