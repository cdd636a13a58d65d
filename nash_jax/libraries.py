"""Heavy libraries, imported where they are first needed and without their notes on CUDA."""

import functools
import importlib.machinery
import os
import sys
import tempfile
import types


@functools.cache
def tensorflow():
  """Returns the module, which seqio brings with it (10 to 20 s)."""
  own = os.dup(2)
  with tempfile.TemporaryFile() as said:
    os.dup2(said.fileno(), 2)
    try:
      import tensorflow as tf

      tf.config.set_visible_devices([], "GPU")  # the accelerator's memory is JAX's
    except BaseException:
      said.seek(0)
      os.write(own, said.read())
      raise
    finally:
      os.dup2(own, 2)
      os.close(own)
  return tf


@functools.cache
def annotations():
  """Imports what the gemma library's blocks are annotated with, and not TensorFlow, which it names.

  One type, tf.Tensor, stands in such an annotation, and no text model ever sees one.
  """
  absent = "tensorflow" not in sys.modules
  if absent:
    stand_in = types.ModuleType("tensorflow")
    stand_in.Tensor = type("Tensor", (), {})
    stand_in.__spec__ = importlib.machinery.ModuleSpec("tensorflow", None)
    sys.modules["tensorflow"] = stand_in
  try:
    import kauldron.typing  # noqa: F401
  finally:
    if absent:
      del sys.modules["tensorflow"]
