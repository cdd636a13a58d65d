"""One table of several plans: `python -m benchmarks.plans A.json B.json`.

The files are what `nash-jax plan --json=FILE` writes; docs/plan.md shows the table.
"""

import json
import pathlib
import sys
from typing import Any

from nash_jax import report
from nash_jax.plan.memory import GIB


def overview(plans: list[dict[str, Any]]) -> str:
  """Returns a table with a line per plan."""
  header = ["topology", "run", "mesh", "held GiB", "at most GiB", "of GiB", "fits", "largest batch"]
  header += [f"{name} s" for name in plans[0]["phases"]]
  rows = []
  for plan in plans:
    mesh = "x".join(map(str, plan["mesh"].values()))
    sizes = [plan[name] for name in ("resident_bytes", "need_bytes", "hbm_bytes")]
    fits = {True: "yes", False: "no", None: "—"}[plan["fits"]]
    bounds = [
      f"{figures['roofline_seconds']:.2g} {figures['bound']}" if figures.get("bound") else "—"
      for figures in plan["phases"].values()
    ]
    row = [plan["topology"], plan["run"], mesh, *(f"{x / GIB:.2f}" if x else "—" for x in sizes)]
    rows.append([*row, fits, plan.get("largest_batch_size", "—"), *bounds])
  return report.markdown_table(header, rows)


if __name__ == "__main__":
  print(overview([json.loads(pathlib.Path(name).read_text()) for name in sys.argv[1:]]))
