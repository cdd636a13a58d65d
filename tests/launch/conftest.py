"""A stand-in for gcloud, whose workers are folders on this machine."""

import os
import shutil
import signal
import subprocess

import pytest
from launch_scripts import script
from paths import ROOT

# Records its arguments; answers what was asked; runs a worker's command in that worker's folder.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\0' "$@" >>"$RECORD"; printf '\\1' >>"$RECORD"
[[ ! -e $ANSWERS/fail ]] || { echo "gcloud: not authorised" >&2; exit 7; }
case "$3 $4" in
  "tpu-vm list") cat "$ANSWERS/node" ;;
  "queued-resources list") cat "$ANSWERS/queue" ;;
  *" delete") : >"$ANSWERS/node"; : >"$ANSWERS/queue" ;;
  "tpu-vm create") echo READY >"$ANSWERS/node" ;;
  "queued-resources create") echo READY >"$ANSWERS/node"; echo ACTIVE >"$ANSWERS/queue" ;;
  "tpu-vm scp") for w in 0 1; do cp "$5" "$WORKERS/$w/${6#*:}"; done ;;
  "tpu-vm ssh")
    for arg; do case $arg in --command=*) do=${arg#*=} ;; --worker=*) which=${arg#*=} ;; esac; done
    [[ $which != all ]] || which="0 1"
    for w in $which; do (cd "$WORKERS/$w" && HOME=$WORKERS/$w bash -c "$do") || exit; done ;;
esac
"""


# The program: prints how it was called, and runs until a signal stops it.
PROGRAM = """#!/usr/bin/env bash
trap 'echo saved; exit ${STATUS:-0}' TERM
printf 'called:'; printf ' <%s>' "$@" "$NASH_JAX_COORDINATOR"; echo
for ((i = 0; i < 300; i++)); do sleep 0.1; done
"""


UV = """#!/usr/bin/env bash
echo "uv $*" >>uv.log
[[ $1 != venv ]] || { mkdir -p .venv/bin; cp "$PROGRAM" .venv/bin/nash-jax; }
"""


@pytest.fixture
def cloud(tmp_path):
  """Returns run(*arguments) of launch/tpu.sh, with what gcloud was asked in its `calls`."""
  bin, answers, checkout = (tmp_path / name for name in ("bin", "answers", "checkout"))
  shutil.copytree(ROOT / "launch", checkout / "launch")
  git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@localhost"]
  for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=all"]):
    subprocess.run([*git, *words], check=True)
  for folder in (bin, answers, tmp_path / "0", tmp_path / "1"):
    folder.mkdir()
  for name in ("node", "queue"):
    (answers / name).touch()
  script(bin / "gcloud", GCLOUD)
  script(bin / "uv", UV)
  env = {
    **os.environ,
    "PATH": f"{bin}:{os.environ['PATH']}",
    "RECORD": str(tmp_path / "record"),
    "ANSWERS": str(answers),
    "WORKERS": str(tmp_path),
    "TPU_POLL_SECONDS": "0.05",
    "PROGRAM": script(tmp_path / "program", PROGRAM),
    "TMPDIR": str(tmp_path),
  }
  for name in ("TPU_PROJECT", "TPU_ZONE"):
    env.pop(name, None)

  def run(*arguments, **more):
    record = tmp_path / "record"
    record.unlink(missing_ok=True)
    done = subprocess.run(
      [str(checkout / "launch" / "tpu.sh"), *arguments],
      env={**env, **more},
      capture_output=True,
      text=True,
      timeout=60,
    )
    text = record.read_text() if record.exists() else ""
    run.calls = [call.split("\0")[:-1] for call in text.split("\1")[:-1]]
    return done

  run.answers, run.folder = answers, tmp_path
  yield run
  for pid in tmp_path.glob("*/nash_jax/runs/launch/pid"):  # what a failed test left
    try:
      os.killpg(int(pid.read_text()), signal.SIGKILL)
    except ProcessLookupError:
      continue
