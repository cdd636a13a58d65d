"""The examples in docstrings: every public name of the games has one, and it does what it shows."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

from nash_jax import games

MODULES = [f"nash_jax.games.{module.name}" for module in pkgutil.iter_modules(games.__path__)]
OPTIONS = doctest.ELLIPSIS


def _own(module):
  """Returns the public functions and classes that a module defines, by name."""
  return {
    name: thing
    for name, thing in vars(module).items()
    if not name.startswith("_")
    and (inspect.isfunction(thing) or inspect.isclass(thing))
    and thing.__module__ == module.__name__
  }


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_an_example(name):
  for public, thing in _own(importlib.import_module(name)).items():
    assert ">>>" in (thing.__doc__ or ""), f"{name}.{public} has no example"


@pytest.mark.parametrize("name", MODULES)
def test_examples_do_what_they_show(name, capsys):
  failed, _ = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
  assert not failed, capsys.readouterr().out
