"""The checks of types and shapes that every test runs under do catch what is wrong."""

import re
import traceback

import jaxtyping
import numpy as np
import pytest
import shapes

from nash_jax.data.judge_template import shown
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.judges import population
from nash_jax.objectives import losses
from nash_jax.types import Prompts, Responses, Verdict


def verdict(*shape):
  p_win = np.full(shape, 0.5, np.float32)
  return Verdict(p_win, np.ones(shape, bool))


def test_arrays_of_one_call_agree_in_their_axes():
  logp = np.zeros((2, 3, 4), np.float32)
  options = {"role_weights": {"reference": 1.0}, "scale": 1.0}
  losses.regression(logp, {"reference": logp}, verdict(2, 3, 3), **options)
  with pytest.raises(jaxtyping.TypeCheckError, match="log_ratios"):
    losses.regression(logp, {"reference": logp[..., 1:]}, verdict(2, 3, 3), **options)
  with pytest.raises(jaxtyping.TypeCheckError, match="logp"):
    losses.regression(logp[0], {"reference": logp[0]}, verdict(2, 3, 3), **options)


def test_a_record_has_the_fields_that_it_states():
  tokens = np.zeros((2, 5), np.int32)
  prompts = Prompts(tokens, tokens == 0, np.arange(2))
  shapes.check_record(prompts)
  for wrong in (
    {"mask": tokens[:, 1:] == 0},
    {"mask": tokens},
    {"index": np.arange(3)},
    {"tokens": tokens.astype(np.float32)},
  ):
    with pytest.raises(
      TypeError, match=f"Prompts.{'mask' if 'mask' in wrong else next(iter(wrong))}"
    ):
      shapes.check_record(prompts.replace(**wrong))


def test_functions_that_take_a_record_check_it():
  tokens = np.zeros((2, 3, 5), np.int32)
  zeros = np.zeros(tokens.shape, np.float32)
  responses = Responses(tokens, tokens == 0, zeros, zeros[..., 1:], tokens[..., 0] == 0)
  prompts = Prompts(tokens[:, 0], tokens[:, 0] == 0, np.arange(2))
  judge = population.judge(Tokenizer(BUNDLED, "plain"))
  with pytest.raises(jaxtyping.TypeCheckError) as error:
    judge.fn(judge.params, prompts, responses, None)
  chain = "".join(traceback.format_exception(error.value))
  assert re.search(r"Responses.logp_sampling: expected .*B K L.*2, 3, 4", chain)
  with pytest.raises(jaxtyping.TypeCheckError, match="prompts"):
    shown("no layout", "no prompts", None, None)
