"""launch/tpu.sh resume: what it does for a slice in any state, and when it has nothing to do."""

import re
import subprocess

import pytest
from launch_scripts import AT, JOB, script, until, worker
from paths import ROOT


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


REFUSES = """#!/usr/bin/env bash
echo "nash-jax train: prompts.path: no data file 'x'"; exit 2
"""


# A loop around a command that ends with its first argument; it leaves with 9 after three turns.
COUNTED = """
turns=0
sleep() { ((++turns < 4)) || exit 9; }
resume() { return $1; }
"""


def test_a_program_that_refused_its_input_ends_the_loop_of_the_pages_with_its_message(cloud):
  """What the pages type in: it would refuse it again. After a new start the loop goes on."""
  assert cloud("create", *AT).returncode == 0
  program = script(cloud.folder / "refuses", REFUSES)
  assert cloud("install", *AT, PROGRAM=program).returncode == 0
  assert cloud("start", *AT, *JOB).returncode == 0
  until(lambda: cloud("status", *AT).stdout.count("exited 2") == 2)
  done = cloud("resume", *AT, *JOB)
  assert done.returncode == 2
  assert "nash-jax train: prompts.path: no data file 'x'\n" in done.stderr
  assert "refused its input (status 2)" in done.stderr.splitlines()[-1]
  assert not [call for call in cloud.calls if "worker.sh start" in call[-1]]
  for page in ("tpu.md", "guides/tpu_slice.md"):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    loop = re.search(r"^while sleep 300; do\n.*?^done$", text, re.MULTILINE | re.DOTALL)[0]
    for status, expected in ((2, 0), (1, 9), (0, 9)):
      code = f"{COUNTED}\n{loop.replace('launch/tpu.sh resume', f'resume {status}')}"
      assert subprocess.run(["bash", "-c", code]).returncode == expected, (page, status)


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
