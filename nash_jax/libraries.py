"""Heavy libraries, imported where they are first needed and without their notes on CUDA."""

import functools
import os
import tempfile


@functools.cache
def tensorflow():
  """Returns the module, which seqio and the gemma library's blocks bring with them (10 to 20 s)."""
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
