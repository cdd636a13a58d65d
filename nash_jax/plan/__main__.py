"""One table of several plans: `python -m nash_jax.plan A.json B.json`."""

import json
import pathlib
import sys

from nash_jax.plan import overview

if __name__ == "__main__":
  print(overview([json.loads(pathlib.Path(name).read_text()) for name in sys.argv[1:]]))
