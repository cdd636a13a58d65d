"""The main job on bundled files: train the storyteller, then run the arena."""

import json
import os
import pathlib
import time
from typing import Any

from ml_collections import ConfigDict

from nash_jax import config, report, train
from nash_jax.jobs import arena


def run(run_config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Trains (or resumes), compares trained, target, base and best-of-4, and writes summary.json.

  Args:
    run_config: a config of an online run, such as configs/stories.py.
    workdir: folder of the run; the arena goes to workdir/arena.

  Returns:
    What workdir/summary.json holds.
  """
  start, folder = time.perf_counter(), pathlib.Path(workdir)
  done = train.run(run_config, workdir)
  if done.stopped:
    return {}  # the command says so
  result = arena.run(_arena_config(run_config, folder), folder / "arena")
  report.curves(folder)
  summary = {
    "seconds": round(time.perf_counter() - start, 1),
    "steps": int(done.state.step),
    "compilations": done.compilations,
    **arena.summary(result, trained="trained", target="target", best_of="best_of_4", base="base"),
  }
  (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
  print(_epilogue(result, summary, folder))
  return summary


def _arena_config(run_config: ConfigDict, folder: pathlib.Path) -> ConfigDict:
  c = config.arena()
  c.seed = run_config.seed
  for part in ("model", "prompts", "sampling"):
    c[part] = run_config[part].copy_and_resolve_references()  # the original stays as it is
  c.prompts.batch_size = 8  # all pairs of eight responses to each are judged at once
  base, judge = run_config.model.weights, run_config.judge.to_dict()
  c.policies = {
    "trained": {"weights": f"{folder}@params", "best_of": 1},
    "target": {"weights": f"{folder}@target", "best_of": 1},
    "base": {"weights": base, "best_of": 1},
    "best_of_4": {"weights": base, "best_of": 4},
  }
  c.judges = {"judge": judge, "population": {**judge, "name": "population"}}
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
    f" {unseen['mean']:.3f} ± {unseen['sigma3']:.3f} under the population it never saw,"
    f" {judged['mean']:.3f} under its judge,"
    f" at KL {summary['kl_to_reference']:.1f} nats a response.",
    f"figures:     {folder}/curves.png, {folder}/arena/arena_population.png",
    f"tables:      {folder}/arena/arena.md, {folder}/summary.json",
    f"curves live: .venv/bin/tensorboard --logdir {folder}/tensorboard",
    f"ask it:      .venv/bin/nash-jax sample --config.model.weights={folder}@params",
  ]
  return "\n".join(lines)
