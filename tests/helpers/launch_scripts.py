"""The launch scripts, programs to stand for others, and a wait."""

import time

from paths import ROOT

TPU, LOCAL, WORKER = (str(ROOT / "launch" / f"{name}.sh") for name in ("tpu", "local", "worker"))


AT = ("--project=my-project", "--zone=us-west4-a")


JOB = (
  "--",
  "train",
  "--config=configs/stories.py",
  '--config.judge.name=it\'s $HOME; "x" *',
  "--workdir=gs://bucket/run 1",
)


def worker(cloud, number, name):
  """Returns what a worker of the fixture `cloud` has in a file of the launch."""
  return (cloud.folder / str(number) / "nash_jax" / "runs" / "launch" / name).read_text()


def script(path, text):
  path.write_text(text)
  path.chmod(0o755)
  return str(path)


def until(what, seconds=20):
  end = time.time() + seconds
  while not what():
    assert time.time() < end, "waited in vain"
    time.sleep(0.05)
