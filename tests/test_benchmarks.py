"""Every benchmark runs at its smallest size and prints the figures that it is for."""

import os
import re
import subprocess
import sys

import paths
import pytest

SMALL = ["--batch=2", "--prompt=4", "--tokens=4", "--repeats=1"]
FIGURES = {
  "decode": (SMALL, r"[\d.]+ times gm\.text.*\n(.*\n)*.*costs [\d.]+ times plain"),
  "nash_md": (SMALL, r"NashMP step costs [\d.]+ times .*\n(.*\n)*.*costs [\d.]+ times plain"),
  "judges": (
    ["--batch=2", "--tokens=4", "--repeats=1"],
    r"[\d.]+ times faster than the pairwise\n.*an iteration with it: [\d.]+ times",
  ),
  "games": (["--iterations=20", "--turns=1"], r"[\d.]+ us an iteration of 10 games"),
  "true_size": (["--smoke", "--repeats=1"], r"\| iteration +\| [\d.]+ "),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_a_benchmark_prints_its_figures(name):
  flags, pattern = FIGURES[name]
  done = subprocess.run(
    [sys.executable, f"benchmarks/{name}.py", *flags],
    cwd=paths.ROOT,
    capture_output=True,
    text=True,
    timeout=600,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert re.search(pattern, done.stdout), done.stdout
