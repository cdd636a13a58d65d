#!/usr/bin/env bash
# launch/tpu.sh runs this on every worker, in its copy of the checkout.
#   install | start JOB FLAG ... | state | stop
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p runs/launch

alive() {
  # After a reboot, the number may belong to another process.
  [[ -s runs/launch/pid ]] &&
    grep -qa nash-jax "/proc/$(<runs/launch/pid)/cmdline" 2>/dev/null
}

install() {
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  uv venv --quiet --allow-existing --python 3.12 .venv
  uv pip install --quiet --python .venv/bin/python --constraint requirements.lock \
    --editable '.[tpu]'
}

start() {
  if alive; then
    printf 'nash-jax is already running, process %s\n' "$(<runs/launch/pid)" >&2
    exit 1
  fi
  rm -f runs/launch/exit
  printf '\n== %s:%s\n' "$(date -u +%FT%TZ)" "$(printf ' %q' nash-jax "$@")" >>runs/launch/log
  # On a TPU jax.distributed finds the other workers itself; Google's own firewall rule leaves this
  # port open. The wrapper survives a SIGTERM to the group, so that it can write the exit status.
  export JAX_COORDINATOR_PORT=${JAX_COORDINATOR_PORT:-8476}
  NASH_JAX_COORDINATOR=auto setsid nohup bash -c \
    'trap : TERM; .venv/bin/nash-jax "$@"; echo $? >runs/launch/exit' nash-jax "$@" \
    >>runs/launch/log 2>&1 </dev/null &
  printf '%s\n' $! >runs/launch/pid
}

state() {
  if alive; then
    echo running
  elif [[ -s runs/launch/exit ]]; then
    local status
    status=$(<runs/launch/exit)
    [[ $status != 75 ]] || status+=': stopped, the same command resumes it'
    printf 'exited %s\n' "$status"
  else
    echo 'not running'
  fi
}

stop() {
  alive || { state; return; }
  kill -TERM -- "-$(<runs/launch/pid)"
  for ((i = 0; i < ${TPU_STOP_SECONDS:-600}; i++)); do
    alive || { state; return; }
    sleep 1
  done
  printf 'nash-jax has not ended after %s s\n' "${TPU_STOP_SECONDS:-600}" >&2
  exit 1
}

case ${1-} in
  install | start | state | stop) "$@" ;;
  *)
    sed -n 2,3p "$0" >&2
    exit 2
    ;;
esac
