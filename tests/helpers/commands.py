"""The command, in a process of its own."""

import os
import subprocess
import sys

from paths import ROOT


def command(*arguments, folder=ROOT):
  """Runs nash-jax with these arguments, in a folder."""
  code = f"import sys; sys.argv = {['nash-jax', *arguments]!r}; from nash_jax import main"
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  return subprocess.run(
    [sys.executable, "-c", f"{code}; main.run()"],
    cwd=folder,
    text=True,
    capture_output=True,
    env={**os.environ, "PYTHONPATH": path},
  )
