"""Pairs to vote on, and `nash-jax vote` in a process of its own."""

import atexit
import itertools
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request

from paths import ROOT

from nash_jax.data.votes import Answer, Pair


def pairs(prompts: int, policies=("x", "y", "z")) -> list[Pair]:
  """Returns all pairs of the policies' answers to some prompts."""
  return [
    Pair(f"prompt {i}", Answer(f"{p} on {i}", p), Answer(f"{q} on {i}", q))
    for i in range(prompts)
    for p, q in itertools.combinations(policies, 2)
  ]


class Served:
  """`nash-jax vote` in a process of its own."""

  def __init__(self, workdir, *arguments):
    code = (
      "import sys; sys.argv = ['nash-jax', *sys.argv[1:]]; from nash_jax import main; main.run()"
    )
    options = ["vote", f"--workdir={workdir}", "--config.port=0", *arguments]
    self.process = subprocess.Popen(
      [sys.executable, "-c", code, *options], cwd=ROOT, text=True, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    atexit.register(self.process.kill)  # should a test fail before it ends it
    self.address = ""
    while "http://" not in self.address:
      line = self.process.stdout.readline()
      assert line, self.process.stderr.read()
      self.address = line.strip()

  def ask(self, action, **said):
    """Posts as a script would; OSError where there is no answer."""
    request = urllib.request.Request(
      f"{self.address}api/{action}", json.dumps(said).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
      return json.load(answer)

  def end(self, number):
    """Sends a signal, and returns the status and what was printed since."""
    self.process.send_signal(number)
    out, errors = self.process.communicate(timeout=60)
    return self.process.returncode, out, errors
