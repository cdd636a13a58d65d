"""The demo on bundled files: trains the storyteller, then plays an arena."""

import os
import pathlib
import time
from typing import Any

from ml_collections import ConfigDict

from nash_jax import config, report, train
from nash_jax.jobs import arena
from nash_jax.run import files, page


def run(run_config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Trains (or resumes), compares trained, target, base and best-of-4, and writes summary.json.

  Args:
    run_config: a config of an online run, such as configs/stories.py.
    workdir: folder of the run; the arena goes to workdir/arena.

  Returns:
    The content of workdir/summary.json.
  """
  start, folder = time.perf_counter(), files.make_folder(workdir)
  base = run_config.model.weights
  config.resolve(_arena_config(run_config, base, base))  # check before the run
  done = train.run(run_config, workdir)
  if done.stopped:
    return {}  # the command prints it
  arena_config = _arena_config(run_config, f"{folder}@params", f"{folder}@target")
  arena.recorded_result(config.resolve(arena_config), folder / "arena")  # removes an outdated one
  result = arena.run(arena_config, folder / "arena")
  report.curves(folder)
  page.leave(page.write_run, folder)  # again, now with the arena
  summary = {
    "seconds": round(time.perf_counter() - start, 1),
    "steps": int(done.state.step),
    "compilations": done.compilations,
    **arena.summary(result, trained="trained", target="target", best_of="best_of_4", base="base"),
  }
  files.write_json(folder / "summary.json", summary)
  print(_epilogue(result, summary, folder))
  return summary


def _arena_config(run_config: ConfigDict, trained: str, target: str) -> ConfigDict:
  c = config.arena()
  c.seed = run_config.seed
  for part in ("model", "prompts", "sampling"):
    c[part] = run_config[part].copy_and_resolve_references()
  c.model.weights = ""  # each policy has its own
  c.prompts.batch_size = 8  # all pairs of a prompt's eight responses are judged at once
  base, c.judges.judge = run_config.model.weights, run_config.judge.to_dict()
  c.policies = {
    "trained": {"weights": trained, "best_of": 1},
    "target": {"weights": target, "best_of": 1},
    "base": {"weights": base, "best_of": 1},
    "best_of_4": {"weights": base, "best_of": 4},
  }
  return c


def _epilogue(result: dict[str, Any], summary: dict[str, Any], folder: pathlib.Path) -> str:
  judged, unseen = (summary["win_rate"]["trained"][judge] for judge in ("judge", "population"))
  texts = [
    f"{item['prompt']}\n  before ▸ {item['continuations']['base']}\n"
    f"  after  ▸ {item['continuations']['trained']}\n"
    for item in result["texts"]
  ]
  lines = [
    *texts,
    f"{summary['steps']} steps in all, {summary['seconds']} s this time. Trained beats base with"
    f" {_number(unseen['mean'])} ± {_number(unseen['sigma3'])} under the population it never saw,"
    f" {_number(judged['mean'])} under its judge,"
    f" at KL {_number(summary['kl_to_reference'], 1)} nats a response.",
    f"a page:      {folder}/report.html, to be opened in a browser",
    f"figures:     {folder}/curves.png, {folder}/arena/arena_population.png",
    f"tables:      {folder}/arena/arena.md, {folder}/summary.json",
    f"curves live: .venv/bin/tensorboard --logdir {folder}/tensorboard",
    f"ask it:      .venv/bin/nash-jax sample --run={folder}",
  ]
  return "\n".join(lines)


def _number(value: float | None, digits: int = 3) -> str:
  return "—" if value is None else f"{value:.{digits}f}"
