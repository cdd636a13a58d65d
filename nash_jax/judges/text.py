"""A Gemma judge whose tokenizer is not the policy's.

Prompts and responses become text, then tokens of the judge's, on the host; the rest is
judges.gemma.
"""

import jax
import numpy as np
from jax import numpy as jnp

from nash_jax.data.judge_template import SHOW_STOP, layout
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.judges.base import Judge
from nash_jax.judges.gemma import make as make_gemma
from nash_jax.models import sharding
from nash_jax.types import Params, Prompts, Responses


def make(config, tokenizer, params: Params | None = None, mesh=None) -> Judge:
  """Builds the judge; see judges.make."""
  judge_tokenizer = Tokenizer(config.model.tokenizer, config.model.template)
  judge, width = make_gemma(config, judge_tokenizer, params, mesh), config.max_tokens
  markers = {*layout(config.template, tokenizer).markers}
  stop = [judge_tokenizer.stop_ids[-1]] if config.template in SHOW_STOP else []

  def retokenize(ids, stopped):
    """Returns the judge's tokens, at most W: the last of a prompt, the first of a response."""
    text = tokenizer.decode([i for i in ids if int(i) not in markers])
    ids = judge_tokenizer.encode(text)
    return ids[-width:] if stopped is None else (ids + stop * int(stopped))[:width]

  def translate(tokens, mask, stopped=None):
    """Returns tokens [... W] and mask, padded right, for rows [... L] padded on either side."""

    def host(tokens, mask, stopped):
      out = np.full((len(tokens), width), judge_tokenizer.pad_id, np.int32)
      lengths = np.zeros(len(tokens), int)
      for row, (ids, real) in enumerate(zip(np.asarray(tokens), np.asarray(mask), strict=True)):
        ids = retokenize(ids[real], None if stopped is None else stopped[row])
        out[row, : len(ids)], lengths[row] = ids, len(ids)
      return out, np.arange(width)[None] < lengths[:, None]

    def local(*rows):
      shape = (len(rows[0]), width)
      kinds = (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool))
      return jax.pure_callback(host, kinds, *rows)

    # A bare callback would gather all rows on one device, and leave what follows there.
    if mesh is not None:
      spec = sharding.batch_sharding(mesh).spec
      local = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)
    rows = [array.reshape(-1, array.shape[-1]) for array in (tokens, mask)]
    out = local(*rows, None if stopped is None else stopped.reshape(-1))
    return tuple(array.reshape(*tokens.shape[:-1], width) for array in out)

  def read(responses):
    tokens, mask = translate(responses.tokens, responses.mask, responses.stopped)
    unknown = jnp.zeros(tokens.shape)
    return Responses(tokens, mask, unknown, unknown, responses.stopped)

  def fn(params, prompts: Prompts, responses: Responses, opponents: Responses | None = None):
    prompts = Prompts(*translate(prompts.tokens, prompts.mask), prompts.index)
    opponents = None if opponents is None else read(opponents)
    return judge.fn(params, prompts, read(responses), opponents)

  return Judge(judge.params, fn)
