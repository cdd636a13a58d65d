"""A real Gemma, in the folder that NASH_JAX_TEST_GEMMA names: what transformers makes of it.

fixtures/real_gemma.npz holds transformers' values of one copy of Gemma 3 270M, and the sum of its
weights (transformers_values.py made it). For other weights they are computed while the tests run,
by the Python that NASH_JAX_TEST_TRANSFORMERS names; it also reads what we export.
"""

import functools
import json
import os
import pathlib
import re

import jax
import numpy as np
import optax
import pytest
import sentencepiece
import transformers_values
from jax import numpy as jnp
from other_python import python_with
from paths import FIXTURES
from real_gemma_texts import LONG, NEW_TOKENS, PROMPTS, SHORT, TEXTS, TURNS

from nash_jax import config, policy, sampler, weights
from nash_jax.config import resolve
from nash_jax.configs.export import get_config
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.jobs import export
from nash_jax.models import gemma, logprobs, lora
from nash_jax.run import checkpoint
from nash_jax.types import Prompts
from nash_jax.weights import hf_config

SCALE, RATE = 2.0, 1e-5  # of the adapters: alpha / rank, and learning rate
LENGTH = 96  # columns of a batch of the short texts, of 11 to 81 tokens


@pytest.fixture(scope="module")
def folder():
  named = os.environ.get("NASH_JAX_TEST_GEMMA")
  if not named:
    pytest.skip(
      "no real Gemma: set NASH_JAX_TEST_GEMMA to a folder with its weights, config.json and"
      " tokenizer.model"
    )
  return pathlib.Path(named)


@pytest.fixture(scope="module")
def model_config(folder):
  """The preset whose config.json the folder has."""
  found = []
  for name in gemma.PRESETS:
    try:
      hf_config.check_config(str(folder), gemma.preset(name))
      found.append(name)
    except ValueError:
      continue
  assert len(found) == 1, f"{folder / 'config.json'} is of the presets {found}, expected one"
  return gemma.preset(found[0])


@pytest.fixture(scope="module")
def run_transformers():
  """(what for, arguments) -> what transformers_values.py prints."""
  return lambda purpose, *args: transformers_values.run(python_with(purpose=purpose), *args)


@pytest.fixture(scope="module")
def expected(folder, run_transformers, tmp_path_factory):
  """What transformers computes of the folder, by name: see transformers_values.values."""
  stored = dict(np.load(FIXTURES / "real_gemma.npz"))
  if transformers_values.weights_sum(folder) != stored["sum"]:
    out = tmp_path_factory.mktemp("values") / "values.npz"
    run_transformers("the stored values are of other weights", folder, out)
    stored = dict(np.load(out))
  return stored


@pytest.fixture(scope="module")
def params(folder, model_config):
  return weights.load(str(folder), model_config)


@pytest.fixture(scope="module")
def pieces(folder):
  return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@functools.cache
def _tokenizer(folder, template):
  return Tokenizer(str(folder / "tokenizer.model"), template)


@pytest.fixture(scope="module")
def logp(model_config):
  """(params, tokens, mask, dtype) -> log-probability of every token after the first column."""
  run = jax.jit(
    lambda params, tokens, mask, dtype: logprobs.token_logprobs(
      params, model_config, tokens, mask, dtype=dtype, chunk=128
    )[0],
    static_argnums=3,
  )
  return lambda *args, dtype=jnp.float32: np.asarray(run(*args, dtype))


def padded(rows, length=LENGTH):
  """Returns tokens and mask of rows of ids, filled up on the left."""
  tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
  for i, ids in enumerate(rows):
    tokens[i, length - len(ids) :], mask[i, length - len(ids) :] = ids, True
  return tokens, mask


@pytest.fixture(scope="module")
def short(expected):
  """The batch of short texts, what is a prediction there, and transformers' log-probabilities."""
  tokens, mask = padded([expected[f"{name}/ids"] for name in SHORT])
  wanted = np.concatenate([expected[f"{name}/logp"] for name in SHORT])
  return tokens, mask, mask[:, :-1], wanted


@pytest.fixture(scope="module")
def base_logp(params, logp, short):
  tokens, mask, *_ = short
  return logp(params, tokens, mask)


def test_texts_and_templates_have_the_pieces_that_sentencepiece_reads(folder, pieces):
  plain, chat = _tokenizer(folder, "plain"), _tokenizer(folder, "gemma")
  bos, end = map(pieces.piece_to_id, ("<bos>", "<end_of_turn>"))
  assert (plain.stop_ids, chat.stop_ids) == ((1,), (1, end))

  def read(text):
    """The ids of a string whose markers are markers, which not every copy's sentencepiece reads."""
    parts = re.split("(<(?:start|end)_of_turn>)", text)
    ids = [[pieces.piece_to_id(x)] if i % 2 else pieces.encode(x) for i, x in enumerate(parts)]
    return [piece for part in ids for piece in part]

  for text in TEXTS.values():
    assert plain.prompt(text) == [bos, *pieces.encode(text)]
    turn = f"<start_of_turn>user\n{text.strip()}<end_of_turn>\n<start_of_turn>model\n"
    assert chat.prompt(f" {text}\n") == [bos, *read(turn)]
  published = (
    "<start_of_turn>user\nBe brief.\n\nHello there<end_of_turn>\n<start_of_turn>model\nHi!"
    "<end_of_turn>\n<start_of_turn>user\nWhat is 7 × 8?<end_of_turn>\n<start_of_turn>model\n"
  )
  assert chat.prompt(TURNS) == [bos, *read(published)]
  assert chat.response("Hi!") == [*pieces.encode("Hi!"), end]


def test_what_is_compared_are_the_texts(folder, expected):
  for name, text in TEXTS.items():
    ids = expected[f"{name}/ids"].tolist()
    assert ids == _tokenizer(folder, "plain").prompt(text)[:LONG]


def test_logprobs_of_a_padded_batch_are_those_of_transformers(short, base_logp):
  """Texts of unequal lengths with padding on the left, against each by itself without."""
  *_, where, wanted = short
  assert np.ptp(wanted) > 10
  print(f"largest difference of {len(wanted)} tokens {np.abs(base_logp[where] - wanted).max():.1e}")
  np.testing.assert_allclose(base_logp[where], wanted, rtol=0, atol=1e-3)


def test_logprobs_of_two_thousand_tokens_are_those_of_transformers(params, logp, expected):
  """Without padding, and across several windows of the local layers."""
  tokens = expected["long/ids"][None].astype(np.int32)
  got = logp(params, tokens, np.ones(tokens.shape, bool))[0]
  assert tokens.shape == (1, 2000)
  print(f"largest difference of 2,000 tokens {np.abs(got - expected['long/logp']).max():.1e}")
  np.testing.assert_allclose(got, expected["long/logp"], rtol=0, atol=1e-3)


def test_greedy_continuations_are_those_of_transformers(params, model_config, pieces, expected):
  """Prompts of unequal lengths in one batch, against each by itself."""
  plain = [[pieces.piece_to_id("<bos>"), *pieces.encode(prompt)] for prompt in PROMPTS]
  tokens, mask = padded(plain, max(map(len, plain)) + 3)
  stops = tuple(map(pieces.piece_to_id, ("<eos>", "<end_of_turn>")))
  greedy = sampler.make_sampler(
    model_config, max_tokens=NEW_TOKENS, samples=1, stop_ids=stops, pad_id=0, top_k=1
  )
  prompts = Prompts(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(len(plain)))
  got = jax.device_get(jax.jit(greedy)(params, prompts, jax.random.key(0)))
  compared = 0
  for i in range(len(PROMPTS)):
    wanted, margin = expected[f"greedy{i}/tokens"], expected[f"greedy{i}/margin"]
    # From a tie on, either side is right.
    ties = np.flatnonzero(margin < 5e-3)
    count = ties[0] if len(ties) else len(wanted)
    np.testing.assert_array_equal(got.tokens[i, 0, :count], wanted[:count])
    np.testing.assert_allclose(
      got.logp[i, 0, :count], expected[f"greedy{i}/logp"][:count], rtol=0, atol=1e-3
    )
    compared += count
  assert compared > NEW_TOKENS * len(PROMPTS) / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampler_and_trainer_agree(params, model_config, folder, dtype):
  """Two drawn responses to each prompt: log-probabilities while drawing, and in training."""
  run, tokenizer = config.train(), _tokenizer(folder, "gemma")
  run.sampling.max_tokens, run.model.dtype = NEW_TOKENS, dtype
  parts = policy.make_policy(run.model, run.sampling, tokenizer, model_config)
  tokens, mask = padded([tokenizer.prompt(prompt) for prompt in PROMPTS], 32)
  prompts = Prompts(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(len(PROMPTS)))
  drawn = jax.jit(parts.make_sampler(samples=2))(params, prompts, jax.random.key(0))
  trained, _ = jax.jit(parts.logprobs)(
    params, prompts=prompts, tokens=drawn.tokens, mask=drawn.mask
  )
  gap = np.abs(np.asarray(trained - drawn.logp))[np.asarray(drawn.mask)]
  print(
    f"{dtype}: sampler against trainer, a token: mean {gap.mean():.1e}, largest {gap.max():.1e}"
  )
  assert len(gap) > NEW_TOKENS * len(PROMPTS)
  assert gap.mean() < {"float32": 1e-4, "bfloat16": 0.05}[dtype]
  assert gap.max() < {"float32": 1e-3, "bfloat16": 0.5}[dtype]


def test_bfloat16_strays_no_further_than_transformers_does(
  params, logp, short, base_logp, expected
):
  tokens, mask, where, wanted = short
  ours = np.abs(logp(params, tokens, mask, dtype=jnp.bfloat16) - base_logp)[where]
  theirs = np.abs(np.concatenate([expected[f"{name}/bfloat16"] for name in SHORT]) - wanted)
  for name, gap in (("nash_jax", ours), ("transformers", theirs)):
    print(f"{name}: bfloat16 against float32, a token: mean {gap.mean():.3f}, max {gap.max():.3f}")
  assert 0 < ours.mean() < 1.5 * theirs.mean()
  assert ours.max() < 0.8  # a tail of one token in two hundred: .41 here, .20 there


@pytest.fixture(scope="module")
def adapters(params, model_config, expected):
  """LoRA's adapters after four steps of Adam on three of the texts: a short run's."""
  rows = [expected[f"{name}/ids"] for name in ("english", "japanese", "russian")]
  tokens, mask = padded(rows, max(map(len, rows)))
  optimizer = optax.adam(RATE)

  def loss(adapters, params):
    joined = lora.join(params, adapters, SCALE)
    found, _ = logprobs.token_logprobs(joined, model_config, tokens, mask, remat=True)
    return -jnp.sum(found) / mask[:, 1:].sum()

  @jax.jit
  def step(adapters, state, params):
    updates, state = optimizer.update(jax.grad(loss)(adapters, params), state)
    return optax.apply_updates(adapters, updates), state

  found = lora.init(jax.random.key(1), params, 8)
  state = optimizer.init(found)
  for _ in range(4):
    found, state = step(found, state, params)
  return found


@pytest.fixture(scope="module")
def merged(params, adapters):
  return jax.jit(lambda *trees: lora.merge(lora.join(*trees, SCALE)))(params, adapters)


def test_merged_adapters_are_the_adapters(params, adapters, merged, logp, short, base_logp):
  tokens, mask, where, _ = short
  apart = logp(lora.join(params, adapters, SCALE), tokens, mask)
  change = np.abs(apart - base_logp)[where]
  gap = np.abs(logp(merged, tokens, mask) - apart)[where].max()
  print(f"adapters change a token by {change.mean():.3f}; merged they differ by {gap:.1e} at most")
  assert change.mean() > 0.01
  assert gap < 1e-3


def test_what_a_files_type_keeps_of_a_short_run(merged, logp, short, base_logp):
  """By how much of the change in log-probabilities is left when the weights have been rounded."""
  tokens, mask, where, _ = short
  change = (logp(merged, tokens, mask) - base_logp)[where]
  kept = {}
  for dtype in ("bfloat16", "float16"):
    rounded = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype).astype(jnp.float32), merged)
    left = (logp(rounded, tokens, mask) - base_logp)[where]
    kept[dtype] = left @ change / (change @ change)
    gap = np.abs(left - change).mean() / np.abs(change).mean()
    print(f"{dtype} keeps {kept[dtype]:.0%} of the change and strays by {gap:.0%} of it")
  assert abs(kept["float16"] - 1) < 0.1
  assert kept["bfloat16"] < kept["float16"]


def test_an_export_is_read_by_transformers_and_stops(
  merged, model_config, folder, logp, expected, run_transformers, tmp_path
):
  """Its own tokenizer and template too, in a folder that nothing else was put into."""
  chat, out = _tokenizer(folder, "gemma"), tmp_path / "out"
  purpose = "to read an export"
  python_with(purpose=purpose)  # skips before half a gigabyte is written
  weights.export(str(out), merged, model_config, "bfloat16", tokenizer=chat)
  got = json.loads(run_transformers(purpose, "--reread", out))
  tokens, mask = padded([expected["english/ids"]])
  wanted = logp(weights.load(str(out), model_config), tokens, mask)[mask[:, :-1]]
  np.testing.assert_allclose(got["logp"], wanted, rtol=0, atol=1e-3)
  assert got["english"] == expected["english/ids"].tolist()
  assert got["turns"] == chat.prompt(TURNS)
  assert got["lengths"] == transformers_values.LENGTHS


@pytest.fixture(scope="module")
def workdir(folder, model_config, adapters, tmp_path_factory):
  """What a run leaves behind whose policy and target have those adapters."""
  workdir, c = tmp_path_factory.mktemp("run"), config.train()
  c.model.preset = next(name for name in gemma.PRESETS if gemma.preset(name) == model_config)
  c.model.weights, c.model.tokenizer = str(folder), str(folder / "tokenizer.model")
  c.model.template, c.model.lora.rank, c.model.lora.alpha = "gemma", 8, 8 * SCALE
  checkpoints = checkpoint.Checkpoints(workdir, keep=1, config=config.describe(resolve(c)))
  checkpoints.save(4, {"params": adapters, "target": adapters})
  checkpoints.close()
  return workdir


def test_the_export_of_a_run_is_the_run_in_transformers_and_says_what_types_lose(
  workdir, merged, logp, expected, run_transformers, tmp_path, capsys
):
  python_with(purpose="to read an export")
  job = get_config()
  job.run, job.to = f"{workdir}@target", str(tmp_path / "out")
  export.run(job)
  said = capsys.readouterr().out
  print(said)
  kept = {name: int(x) for name, x in re.findall(r"(\w+) keeps (\d+)%", said)}
  assert kept["bfloat16"] < 80 < kept["float16"]
  got = json.loads(run_transformers("to read an export", "--reread", tmp_path / "out"))
  tokens, mask = padded([expected["english/ids"]])
  wanted = logp(merged, tokens, mask)[mask[:, :-1]]
  gap = np.abs(np.asarray(got["logp"]) - wanted).max()
  print(f"transformers on the export in float32: largest difference {gap:.1e}")
  assert gap < 1e-4
  assert got["lengths"] == transformers_values.LENGTHS


def test_adapters_that_peft_applies_or_merges_are_ours(
  workdir, folder, params, adapters, logp, expected, run_transformers, tmp_path
):
  python_with(purpose="to apply adapters")
  job = get_config()
  job.run, job.to, job.adapter = str(workdir), str(tmp_path / "out"), True
  export.run(job)
  got = json.loads(run_transformers("to apply adapters", "--adapters", tmp_path / "out", folder))
  tokens, mask = padded([expected["english/ids"]])
  wanted, base = (
    logp(tree, tokens, mask)[mask[:, :-1]] for tree in (lora.join(params, adapters, SCALE), params)
  )
  assert np.abs(wanted - base).mean() > 0.01
  for name, x in got.items():
    gap = np.abs(np.asarray(x) - wanted).max()
    print(f"PEFT, {name}: largest difference {gap:.1e}")
    assert gap < 1e-4
