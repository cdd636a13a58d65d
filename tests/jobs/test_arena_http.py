"""An arena whose judge is behind a server: what it asks, and how it ends."""

import os
import signal
import subprocess
import sys
import threading

import arenas
import jax
import numpy as np
import pytest
from jax import numpy as jnp
from judge_server import error, says
from paths import ROOT

import nash_jax
from nash_jax import judges
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.jobs import arena
from nash_jax.types import Prompts, Responses


def arena_config(files, server, policies=("base", "twin")):
  config = arenas.small(files)
  config.policies = {name: {**config.policies[name]} for name in policies}
  config.max_prompts, config.prompts.batch_size, config.texts = 3, 2, 0
  judge = nash_jax.config.arena().judges.judge
  judge.update({"name": "http", "template": "gemma"})
  judge.http.update({"model": "m", "backoff": 0.0, "retries": 0})
  judge.http.url = f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
  config.judges = {"judge": judge}
  return config


class Digits:
  """Stands for a policy and its held-out prompts: random words, and no log-probabilities."""

  def __init__(self, tokenizer):
    self.words = np.array([tokenizer.encode(word)[0] for word in ("cat", "dog", "ball", "saw")])

  def all(self, indices):
    indices = np.asarray(indices)
    tokens = self.words[np.stack([indices // 4, indices % 4], axis=1)]
    return Prompts(tokens, np.ones(tokens.shape, bool), indices)

  def make_sampler(self, samples):
    def sample(params, prompts, key):
      shape = (len(prompts.tokens), samples, 6)
      tokens = jnp.asarray(self.words)[jax.random.randint(key, shape, 0, 4)]
      zeros = jnp.zeros(shape)
      return Responses(tokens, jnp.ones(shape, bool), zeros, zeros, jnp.ones(shape[:2], bool))

    return sample

  def logprobs(self, params, prompts, tokens, mask, **_):
    return jnp.zeros(tokens.shape), jnp.zeros(tokens.shape)


@pytest.mark.slow
def test_an_arena_pays_for_no_filler(serve):
  """Three prompts in batches of two: a fourth is not asked about."""
  server, config = serve(lambda text, times: (200, says("A" if len(text) % 2 else "B.")))
  tokenizer = Tokenizer(BUNDLED, "plain")
  setting = nash_jax.config.arena()  # base, and the best of 4 of it
  setting.prompts.batch_size, setting.select_judge = 2, "judge"
  policy, judge = Digits(tokenizer), judges.make(config, tokenizer)
  params = dict.fromkeys(setting.policies, jnp.zeros(()))
  judged = arena._sample_and_judge(setting, policy, 3, params, {"judge": judge}, policy)
  # A prompt: the best of 4 for each of 2 samples, 6 pairs each; then 6 pairs of the 4 responses,
  # of which some were compared already.
  assert 2 * (2 * 6 + 6) * 2 < server.asked.total() <= 3 * (2 * 6 + 6) * 2
  assert set(server.asked.values()) == {1}
  verdict = judged.verdicts["judge"]
  np.testing.assert_array_equal(verdict.valid, np.broadcast_to(~np.eye(4, dtype=bool), (3, 4, 4)))
  assert verdict.metrics["valid"].weight == 3 * 6, "and counts no filler"


@pytest.mark.slow
def test_an_arena_whose_server_also_picks_the_best_pays_for_nothing_twice(serve, files, tmp_path):
  server, _ = serve(lambda text, times: (200, says("A" if len(text) % 2 else "B.")))
  config = arena_config(files, server, ("base", "best_of_4"))
  result = arena.run(config, tmp_path)
  # A prompt: the best of 4 for each of 2 samples, 6 pairs each; then 6 pairs of the 4 responses.
  asked = server.asked.total()
  assert 2 * (2 * 6 + 6) * 2 < asked <= 3 * (2 * 6 + 6) * 2
  assert set(server.asked.values()) == {1}
  assert arena.run(config, tmp_path) == result
  assert server.asked.total() == asked


def start_arena(workdir, port, *arguments):
  """Starts the command on bundled policies that a server on this port judges."""
  flags = ("name=http", "template=gemma", "http.model=x", "http.retries=0")
  flags += (f"http.url=http://127.0.0.1:{port}/v1/chat/completions", *arguments)
  return subprocess.Popen(
    [
      *(sys.executable, "-c", "from nash_jax import main; main.run()", "arena"),
      "--config=configs/arena.py:other=assets:stories/policy.safetensors",
      *(f"--config.judges.judge.{flag}" for flag in flags),
      *("--config.select_judge=population", "--config.max_prompts=2"),
      *("--config.sampling.max_tokens=8", f"--workdir={workdir}"),
    ],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ("reply", "message"),
  [
    (
      (400, error("max_tokens is not supported, use max_completion_tokens")),
      "32 refused, such as: answered 400 Bad Request ('max_tokens is not supported, use",
    ),
    (
      (200, says("", finish_reason="length")),
      "32 answered neither A nor B, such as: '' (finish_reason 'length')",
    ),
    ((401, error("Incorrect API key")), "answered 401 Unauthorized ('Incorrect API key'): check"),
    (None, "cannot be reached (ConnectError: "),
  ],
)
def test_the_command_ends_with_one_line_of_what_the_server_said(serve, tmp_path, reply, message):
  server, _ = serve(lambda text, times: reply)
  port = server.server_port
  if reply is None:
    server.shutdown()
    server.server_close()
  process = start_arena(tmp_path, port)
  _, errors = process.communicate()
  assert process.returncode == 2, errors
  assert "Traceback" not in errors
  last = errors.splitlines()[-1]
  assert last.startswith("nash-jax arena: the judge at http://127.0.0.1:")
  assert message in last
  assert not (tmp_path / "arena.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_arena_whose_server_is_silent(serve, tmp_path, number):
  asked, ended = threading.Event(), threading.Event()

  def spoil(text, times):
    asked.set()
    ended.wait(600)
    return 200, says("A")

  server, _ = serve(spoil)
  process = start_arena(tmp_path, server.server_port, "http.timeout=600")
  try:
    assert asked.wait(300)
    process.send_signal(number)
    process.communicate(timeout=60)  # of which a busy machine takes ten seconds to leave Python
  finally:
    process.kill()
    ended.set()
  assert process.returncode == {signal.SIGINT: 130}.get(number, -number)
