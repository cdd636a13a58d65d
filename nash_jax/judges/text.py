"""A Gemma judge whose tokenizer is not the policy's.

The host decodes prompts and responses to text and encodes them for the judge; see judges.gemma.
"""

import jax
import numpy as np
from jax import numpy as jnp

from nash_jax.data.corpus import pad
from nash_jax.data.judge_template import SHOW_STOP, hidden_ids, without_thoughts
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.judges.base import Judge
from nash_jax.judges.gemma import make as make_gemma
from nash_jax.models import sharding
from nash_jax.types import Params, Prompts, Responses


def make(config, tokenizer: Tokenizer, params: Params | None = None, mesh=None) -> Judge:
  """Builds the judge; see judges.make."""
  judge_tokenizer = Tokenizer(config.model.tokenizer, config.model.template)
  judge, width = make_gemma(config, judge_tokenizer, params, mesh), config.max_tokens
  markers, thought = hidden_ids(tokenizer)
  stop = [judge_tokenizer.stop_ids[-1]] if config.template in SHOW_STOP else []

  def retokenize(ids, stopped):
    """Returns at most W of the judge's tokens: the last of a prompt, the first of a response."""
    ids = judge_tokenizer.encode(tokenizer.decode([i for i in ids if int(i) not in markers]))
    return ids[-width:] if stopped is None else (ids + stop * int(stopped))[:width]

  def host(tokens, mask, stopped):
    tokens = np.asarray(tokens)
    mask = without_thoughts(thought, tokens, np.asarray(mask))
    rows = [ids[shown] for ids, shown in zip(tokens, mask, strict=True)]
    ends = [None] * len(rows) if stopped is None else stopped
    return pad([*map(retokenize, rows, ends)], width, judge_tokenizer.pad_id)

  def call_host(*arrays):
    shape = (len(arrays[0]), width)
    shapes = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool)
    return jax.pure_callback(host, shapes, *arrays)

  # A plain callback would gather all rows on one device, where later operations would stay.
  if mesh is not None:
    spec = sharding.batch_sharding(mesh).spec
    call_host = jax.shard_map(call_host, mesh=mesh, in_specs=spec, out_specs=spec)

  def translate(tokens, mask, stopped=None):
    """Returns right-padded tokens [... W] and mask for rows [... L] padded on any side."""
    rows = [array.reshape(-1, array.shape[-1]) for array in (tokens, mask)]
    translated = call_host(*rows, None if stopped is None else stopped.reshape(-1))
    return tuple(array.reshape(*tokens.shape[:-1], width) for array in translated)

  def translate_responses(responses: Responses) -> Responses:
    tokens, mask = translate(responses.tokens, responses.mask, responses.stopped)
    unknown = jnp.zeros(tokens.shape)
    return Responses(tokens, mask, unknown, unknown, responses.stopped)

  def fn(params, prompts: Prompts, responses: Responses, opponents: Responses | None = None):
    tokens, mask = translate(prompts.tokens, prompts.mask)
    prompts = Prompts(tokens, mask, prompts.index)
    opponents = None if opponents is None else translate_responses(opponents)
    return judge.fn(params, prompts, translate_responses(responses), opponents)

  return Judge(judge.params, fn)
