"""Types and shapes of the games: every one is stated, and tests run with what is stated checked."""

import ast
import pathlib

import jaxtyping
import numpy as np
import pytest

from nash_jax import games
from nash_jax.games import preference, proximal, solvers, zoo

FILES = sorted(pathlib.Path(games.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_parameter_and_return_is_typed(path):
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.FunctionDef):
      arguments = node.args
      every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
      every += [rest for rest in (arguments.vararg, arguments.kwarg) if rest]
      for argument in every:
        assert argument.annotation or argument.arg in ("self", "cls"), (node.name, argument.arg)
      assert node.returns, f"{node.name} states no return type"


@pytest.mark.parametrize(
  "call",
  [
    lambda: solvers.init(np.float64(0)),  # no action axis
    lambda: solvers.init("ab"),
    lambda: zoo.dice({"a": (1, 2)}, name=7),
    lambda: zoo.dice({"a": (1, 2)}, nash=[1.0]),  # a list, where an array is stated
  ],
)
def test_what_a_function_lets_pass_has_the_types_that_it_states(call):
  with pytest.raises(jaxtyping.TypeCheckError):
    call()


def test_arrays_of_one_call_agree_in_their_axes():
  """A policy may be shared by contexts, but has the game's actions, and its contexts if any."""
  log_ref = np.log(np.full((2, 3), 1 / 3))
  game = solvers.Game(zoo.random_game(0, 3, contexts=2).p_win, log_ref, 0.1)
  assert proximal.prox(game, 0.5, log_ref, log_ref).shape == (2, 3)
  assert preference.exploitability(game.p_win, np.full(3, 1 / 3)).shape == ()
  with pytest.raises(jaxtyping.TypeCheckError, match="log_base"):
    proximal.prox(game, 0.5, np.zeros((2, 1)), log_ref)  # which broadcasts
