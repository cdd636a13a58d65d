"""Functions for the notebooks: a run with live curves, texts beside the reference's, export."""

import os
import pathlib
import threading

from ml_collections import ConfigDict

from nash_jax import report, train
from nash_jax.data import files
from nash_jax.jobs.export import run as run_export


def train_and_draw(
  config: ConfigDict, workdir: str | os.PathLike[str], seconds: float = 20.0
) -> train.Done:
  """Trains like train.run, and redraws its curves below the cell every few seconds."""
  from IPython.display import Image, Markdown, display

  handle = display(Markdown("Curves come with the first evaluation."), display_id=True)
  finished = threading.Event()

  def draw() -> None:
    while not finished.wait(seconds):
      try:
        handle.update(Image(report.curves(workdir)))
      except (OSError, ValueError) as error:  # the run has not recorded anything yet
        handle.update(Markdown(f"No curves yet: {error}"))

  artist = threading.Thread(target=draw, daemon=True)
  artist.start()
  try:
    done = train.run(config, workdir)
  finally:
    finished.set()
    artist.join()
  handle.update(Image(report.curves(workdir)))
  return done


def side_by_side(workdir: str | os.PathLike[str], count: int = 4) -> str:
  """Returns the last held-out texts of a run beside the reference's, as Markdown."""
  path = pathlib.Path(workdir) / "samples.jsonl"
  rows = [row for _, row in files.read_records(path)]
  last = [row for row in rows if row["step"] == rows[-1]["step"]][:count]
  texts = [
    {
      "prompt": row["prompt"],
      "continuations": {"before": row["reference"], "after": row["response"]},
    }
    for row in last
  ]
  return report.side_by_side(texts)


def export(config: ConfigDict, workdir: str | os.PathLike[str], folder: str) -> None:
  """Writes the trained policy as a Hugging Face folder with its card, in float32.

  Narrower dtypes round away a short run's changes; the export prints what they would keep.
  """
  export_config = {
    "run": f"{workdir}@params", "to": folder, "dtype": "float32", "adapter": False,
    "base_model": "", "tokenizer": config.model.tokenizer, "arena": "",
  }  # fmt: skip
  run_export(ConfigDict(export_config))
