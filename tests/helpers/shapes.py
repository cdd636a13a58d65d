"""What checks types and shapes while tests run: beartype with jaxtyping, and our records' fields.

conftest.py has jaxtyping's import hook put `typechecker` around every function of the modules whose
arrays cross rooms. Shapes of arguments and results must agree within a call; the fields of a record
(Prompts, Responses, Verdict, Answers, those of the games) must have the shapes stated for them.
"""

import functools
import inspect
import typing

import beartype
import jax
import numpy as np
from jaxtyping import AbstractArray, jaxtyped

# A whole number is a float, as in Python's own typing.
_beartype = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
RECORDS = ("Prompts", "Responses", "Verdict", "Answers", "Game", "State", "ZooGame", "Outcome")


def typechecker(fn):
  """Wraps a function as beartype does, and checks the records among its arguments and results."""
  if inspect.isclass(fn) or fn.__name__ == "__init__":
    return fn  # as trees, records also hold shardings, shapes, or arrays with further axes
  checked = _beartype(fn)

  @functools.wraps(fn)
  def wrapper(*args, **kwargs):
    for value in (*args, *kwargs.values()):
      check_record(value)
    result = checked(*args, **kwargs)
    for value in result if isinstance(result, tuple) else (result,):
      check_record(value)
    return result

  return wrapper


def typechecker_after(fn):
  """As typechecker, once the function has returned: what it refuses itself stays its own error.

  jaxtyping has two stubs checked: one of the arguments before the call, whose return type is Any,
  and one of arguments and result after it. So whatever a function accepts has the types it states.
  """
  before = not inspect.isclass(fn) and fn.__annotations__.get("return") is typing.Any
  return fn if before else typechecker(fn)


def check_record(record) -> None:
  """Raises TypeError where an array field of a record has another type or shape than stated."""
  if type(record).__name__ not in RECORDS:
    return
  with jaxtyped("context"):  # the axes of one record agree with each other
    for name, options in array_fields(type(record)).items():
      value = getattr(record, name)
      if isinstance(value, jax.Array | np.ndarray) and not isinstance(value, options):
        got = f"{value.dtype}{list(value.shape)}"
        raise TypeError(f"{type(record).__name__}.{name}: expected {options[0]}, got {got}")


@functools.cache
def array_fields(record: type) -> dict[str, tuple[type, ...]]:
  """Returns the types that each array field of a record may have, by name."""
  hints = typing.get_type_hints(record, globalns=vars(inspect.getmodule(record)))
  options = {name: typing.get_args(hint) or (hint,) for name, hint in hints.items()}
  arrays = {
    name: tuple(o for o in some if inspect.isclass(o) and issubclass(o, AbstractArray))
    for name, some in options.items()
  }
  return {name: some for name, some in arrays.items() if some}
