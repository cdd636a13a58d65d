"""A Gemma judge whose tokenizer is not the policy's.

Prompts and responses become text and the judge's judge_tokenizer tokens on the host; the rest is judges.gemma.
"""

import jax
import numpy as np
from jax import numpy as jnp

from nash_jax.data.judge_template import SHOW_STOP, layout
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.judges import gemma
from nash_jax.judges.base import Judge
from nash_jax.models import sharding
from nash_jax.types import Params, Prompts, Responses


def make(config, tokenizer, params: Params | None = None, mesh=None) -> Judge:
  """Builds the judge; see judges.make."""
  judge_tokenizer = Tokenizer(config.model.tokenizer, config.model.template)
  judge, width = gemma.make(config, judge_tokenizer, params, mesh), config.max_tokens
  markers = {*layout(config.template, tokenizer).markers}
  stop = [judge_tokenizer.stop_ids[-1]] if config.template in SHOW_STOP else []

  def translate(x, stopped=None):
    """Returns tokens [N W] and mask of the judge's for rows of the policy's, which lie anyhow.

    Of more than W tokens a prompt (no `stopped`) keeps the last, a response the first.
    """

    def host(tokens, mask, stopped):
      out, kept = np.full((len(tokens), width), judge_tokenizer.pad_id, np.int32), np.zeros(len(tokens), int)
      for row, (ids, real) in enumerate(zip(np.asarray(tokens), np.asarray(mask), strict=True)):
        ids = judge_tokenizer.encode(tokenizer.decode([i for i in ids[real] if int(i) not in markers]))
        ids = ids[-width:] if stopped is None else (ids + stop * int(stopped[row]))[:width]
        out[row, : len(ids)], kept[row] = ids, len(ids)
      return out, np.arange(width)[None] < kept[:, None]

    def local(*rows):
      shape = (len(rows[0]), width)
      kinds = (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool))
      return jax.pure_callback(host, kinds, *rows)

    # A bare callback would gather all rows on one device, and leave what follows there.
    if mesh is not None:
      spec = sharding.batch_sharding(mesh).spec
      local = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)
    rows = [a.reshape(-1, a.shape[-1]) for a in (x.tokens, x.mask)]
    found = local(*rows, None if stopped is None else stopped.reshape(-1))
    return (a.reshape(*x.tokens.shape[:-1], width) for a in found)

  def responses(y):
    tokens, mask = translate(y, y.stopped)
    unknown = jnp.zeros(tokens.shape)
    return Responses(tokens, mask, unknown, unknown, y.stopped)

  def fn(params, prompts: Prompts, y: Responses, y2: Responses | None = None):
    x = Prompts(*translate(prompts), prompts.index)
    return judge.fn(params, x, responses(y), None if y2 is None else responses(y2))

  return Judge(judge.params, fn)
