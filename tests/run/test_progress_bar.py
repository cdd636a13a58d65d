"""The progress bar: what it shows, and that no message lands on its line."""

import io
import logging
import re
import sys

import pytest
from metric_files import full, lines, start

from nash_jax.run import metrics


def test_a_progress_bar_that_cannot_be_written_is_switched_off(tmp_path, caplog, monkeypatch):
  caplog.set_level(logging.WARNING, "nash_jax.run.metrics")
  m = start(tmp_path)
  monkeypatch.setattr(m._bar, "update", full)
  m.push(0, {"loss": 0.0})
  m.push(1, {"loss": 0.0})
  m.close()
  assert "the progress bar cannot be written" in caplog.text
  assert len(lines(tmp_path)) == 2


def test_the_bar_shows_the_numbers_asked_for(tmp_path, capsys):
  m = metrics.Metrics(tmp_path, first_step=0, total_steps=2, show=("loss", "p_win"))
  m.push(0, {"loss": 0.12345, "p_win": 0.5, "kappa": 0.1})
  m.push(1, {"loss": 0.25})
  m.close()
  out, err = capsys.readouterr()
  assert all(text in err for text in ("2/2", "loss=0.25", "p_win=0.5"))
  assert "kappa" not in err + out


def test_the_bar_says_that_the_first_step_compiles_and_how_long_that_took(tmp_path, capsys, caplog):
  caplog.set_level(logging.INFO, "nash_jax.run.metrics")
  m = metrics.Metrics(tmp_path, first_step=3, total_steps=9)
  assert "compiling for the first step" in capsys.readouterr().err
  for step in range(3, 6):
    m.push(step, {"loss": 0.0})
  m.close()
  assert re.findall(r"step 3 took \d+ s, compilation included", caplog.text)
  assert caplog.text.count("compilation") == 1
  assert "compiling" not in capsys.readouterr().err.split("\r")[-1]
  metrics.Metrics(tmp_path, first_step=9, total_steps=9).close()
  assert "compiling" not in capsys.readouterr().err, "a finished run compiles nothing"


@pytest.mark.parametrize("on_screen", [False, True])
def test_no_message_lands_on_the_line_of_the_bar(tmp_path, monkeypatch, on_screen):
  err = io.StringIO()
  monkeypatch.setattr(sys, "stderr", err)
  monkeypatch.setattr(err, "isatty", lambda: on_screen, raising=False)
  handler = logging.StreamHandler(err)
  logger = logging.getLogger("nash_jax.run.metrics")
  monkeypatch.setattr(logger, "handlers", [handler])
  monkeypatch.setattr(logger, "level", logging.INFO)
  m = metrics.Metrics(tmp_path, first_step=0, total_steps=6)
  for step in range(6):
    m.push(step, {"loss": 0.0, "flip_rate": 1.0})
  m.close()
  text = err.getvalue()
  assert on_screen or "\r" not in text
  # What a reader sees of a line: what was written since the cursor went back, over blanks.
  seen = [line.rpartition("\r")[2] if on_screen else line for line in text.split("\n")]
  for message in (r"step 0 took \d+ s, compilation included", "step 2: .+"):
    assert [line for line in seen if re.fullmatch(message, line)], text
  bars = [line for line in seen if "6/6" in line]
  assert len(bars) == 1
  assert re.fullmatch(r"100%\|[█#]+\| 6/6 .*\]", bars[0].strip())
