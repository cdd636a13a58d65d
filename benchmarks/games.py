"""EGPO iterations a second, 10 games of 10 actions, gap every iteration: jax against torch loops.

    python benchmarks/games.py --torch-python=PATH_TO_A_PYTHON_WITH_TORCH

All run the same proximal update in float32 on the same games and must agree on an early gap. Torch
is plain eager code without gradients, twice: "a game at a time", as the public simulator goes
through its games, and "batched by hand", all ten games in each operation. It lives in an
environment of its own, and so in a process. The three take turns on one thread each, in CPU time,
and the best run of each counts: a busy machine disturbs that least.
"""

import argparse
import json
import subprocess
import sys
import time

import numpy as np

GAMES, ACTIONS, BETA, STEP = 10, 10, 0.1, 0.5


def make_games():
  rng = np.random.default_rng(0)
  margin = rng.normal(size=(GAMES, ACTIONS, ACTIONS))
  return (1 / (1 + np.exp(margin.swapaxes(1, 2) - margin))).astype(np.float32)


def torch_loop(p_win, iterations):
  """Returns the gap after each iteration, averaged over contexts; p_win is [A A] or [X A A]."""
  import torch

  p_win = torch.tensor(p_win)
  log_ref = torch.full(p_win.shape[:-1], -float(np.log(ACTIONS)))

  def wins(logp):
    policy = logp.exp()
    return p_win @ policy if p_win.ndim == 2 else torch.bmm(p_win, policy[..., None])[..., 0]

  def prox(base, opponent):
    mixed = (1 - STEP * BETA) * base + STEP * BETA * log_ref
    return torch.log_softmax(mixed + STEP * wins(opponent), -1)

  logp, gaps = log_ref, []
  for _ in range(iterations):
    half = prox(logp, logp)
    logp = prox(logp, half)
    best = torch.log_softmax(log_ref + wins(logp) / BETA, -1)
    gaps.append(BETA * (logp.exp() * (logp - best)).sum(-1).mean())
  return torch.stack(gaps).numpy()


def best_of(what, repeats=5):
  seconds = []
  for _ in range(repeats):
    start = time.process_time()
    what()
    seconds.append(time.process_time() - start)
  return min(seconds)


def torch_turn(iterations):
  import torch

  torch.set_grad_enabled(False)
  torch.set_num_threads(1)
  p_win, report = make_games(), {}
  for name, batches in (("a game at a time", list(p_win)), ("batched by hand", [p_win])):
    gap = np.mean([torch_loop(batch, 5)[-1] for batch in batches])
    seconds = best_of(lambda batches=batches: [torch_loop(one, iterations) for one in batches])
    report[name] = seconds / iterations * 1e6, float(gap)
  return report


def make_jax(iterations):
  """Returns a function that runs the loop once -> (microseconds per iteration, early gap)."""
  import jax.numpy as jnp

  from nash_jax.games import solvers

  p_win = jnp.asarray(make_games())
  game = solvers.Game(p_win, jnp.full(p_win.shape[:2], -jnp.log(ACTIONS)), jnp.asarray(BETA))
  knobs = solvers.Knobs(*(jnp.asarray(v) for v in (STEP, 1.0, 0.0, 0.0)))

  def loop():
    _, gaps = solvers.run("egpo", "proximal", game, knobs, None, points=iterations)
    return gaps.block_until_ready()

  gap = float(loop()[4])  # compiles
  return lambda: (best_of(loop) / iterations * 1e6, gap)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--torch-python", help="a python that can import torch and numpy")
  parser.add_argument(
    "--torch-turn", action="store_true", help="set when that python runs this file"
  )
  parser.add_argument("--iterations", type=int, default=20_000)
  parser.add_argument("--turns", type=int, default=5)
  flags = parser.parse_args()
  if flags.torch_turn:
    print(json.dumps(torch_turn(200)))
    return
  turn, seen = make_jax(flags.iterations), {}
  for _ in range(flags.turns):
    seen.setdefault("jax", []).append(turn())
    if flags.torch_python:
      command = [flags.torch_python, __file__, "--torch-turn"]
      done = subprocess.run(command, check=True, capture_output=True, text=True)
      for name, result in json.loads(done.stdout).items():
        seen.setdefault(f"torch, {name}", []).append(result)
  ours = min(seen["jax"])[0]
  for name, results in seen.items():
    np.testing.assert_allclose([gap for _, gap in results], seen["jax"][0][1], rtol=1e-3)
    best = min(results)[0]
    print(f"{name}: {best:.2f} us an iteration of {GAMES} games, {best / ours:.0f} times jax's")


if __name__ == "__main__":
  sys.exit(main())
