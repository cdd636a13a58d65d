"""Where things lie: the repository, what tests read, and what programs that tests start import."""

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
# The modules of tests, in the environment of a process of its own.
PYTHONPATH = os.pathsep.join(
  [str(ROOT), *(str(ROOT / "tests" / name) for name in ("configs", "helpers", "programs"))]
)
