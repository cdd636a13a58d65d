"""The online loop waits for the device only where it must."""

from nash_jax.run import metrics


def test_the_loop_reads_nothing_of_the_step_in_hand(start, tmp_path, monkeypatch):
  """Only a checkpoint's score may: saving waits for the device anyway."""
  push, read, value = metrics.Metrics.push, metrics.Metrics.read, metrics.Metrics.value
  current, reads, scoring = [-1], [], []

  def watched_push(self, step, values):
    current[0] = step
    push(self, step, values)

  def watched_value(self, step, name):
    assert name == "eval/win_rate_vs_reference"
    assert step in (3, 6)
    scoring.append(step)
    try:
      return value(self, step, name)
    finally:
      scoring.pop()

  def watched_read(self, step, values):
    closing = step == 6
    if step >= current[0] and not scoring and not closing:
      raise AssertionError(f"values of step {step} are read in step {current[0]}")
    reads.append(step)
    return read(self, step, values)

  monkeypatch.setattr(metrics.Metrics, "push", watched_push)
  monkeypatch.setattr(metrics.Metrics, "value", watched_value)
  monkeypatch.setattr(metrics.Metrics, "read", watched_read)
  start(tmp_path)
  assert reads == [0, 1, 2, 3, 3, 4, 5, 6, 6]


def test_nothing_but_the_reader_waits_for_the_device(start, assembled, tmp_path, monkeypatch):
  """Values handed to the loop refuse to become numbers outside of metrics.py."""
  reading = []

  class Late:
    def __init__(self, array):
      self.array = array

    def __array__(self, *args, **kwargs):
      raise AssertionError("a device value is read in the loop")

    __float__ = __int__ = __bool__ = __array__

  read = metrics.Metrics.read

  def open_late(self, step, values):
    reading.append(step)
    return read(self, step, {n: v.array if isinstance(v, Late) else v for n, v in values.items()})

  def late(function):
    def wrapped(*args):
      state, values = function(*args)
      # The clock's thread waits for the gradient's norm.
      return state, {n: v if n == "gradient_norm" else Late(v) for n, v in values.items()}

    return wrapped

  monkeypatch.setattr(metrics.Metrics, "read", open_late)
  done = start(tmp_path, train_step=_Counted(late(assembled.programs.train_step)))
  assert int(done.state.step) == 6
  assert len(reading) == 9


class _Counted:
  """A function in the place of a compiled one, which tells its compilations."""

  def __init__(self, function):
    self._function = function

  def __call__(self, *args):
    return self._function(*args)

  def _cache_size(self):
    return 1
