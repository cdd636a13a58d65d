"""The launch scripts, programs to stand for others, and a wait."""

import time

from paths import ROOT

TPU, LOCAL, WORKER = (str(ROOT / "launch" / f"{name}.sh") for name in ("tpu", "local", "worker"))


def script(path, text):
  path.write_text(text)
  path.chmod(0o755)
  return str(path)


def until(what, seconds=20):
  end = time.time() + seconds
  while not what():
    assert time.time() < end, "waited in vain"
    time.sleep(0.05)
