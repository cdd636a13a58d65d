"""Episodes a second in games of imperfect information: numba, jax and OpenSpiel's MCCFR.

    python benchmarks/trees.py

Needs the extra `games`. Times are CPU times of all threads, which a busy machine disturbs least.
Three tables:

* Kuhn poker: five methods on a lane a core, taking turns with outcome-sampling MCCFR of OpenSpiel,
  in Python and in C++. An iteration of it is two episodes, one a player. The best turn of each
  counts.
* Liar's dice of growing size, on one lane, with policies that stay nearly uniform: the mean number
  of decisions in an episode is then known exactly.
* The same update as one jax program, `vmap` over lanes and `lax.scan` over episodes. It must end
  where numba's does. Its draws are made before its time starts; numba's time contains them.
"""

import argparse
import concurrent.futures
import functools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from nash_jax.games import regret, trees

jax.config.update("jax_enable_x64", True)
CORES = os.cpu_count()


def seconds(what):
  """Returns the CPU time of all threads, and the time by the clock."""
  cpu, clock = time.process_time(), time.perf_counter()
  what()
  return time.process_time() - cpu, time.perf_counter() - clock


def lanes(tree, rule, count, episodes):
  """Returns the states of so many lanes, each of a seed of its own, a thread a core."""

  def lane(seed):
    return regret.learn(tree, rule, regret.init(tree, rule, seed), episodes)

  with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
    return list(pool.map(lane, range(count)))


def peers(turns, episodes, iterations):
  from open_spiel.python.algorithms import outcome_sampling_mccfr

  spiel, tree = trees.openspiel(), trees.load("kuhn_poker")
  game = spiel.load_game(tree.name)
  python = outcome_sampling_mccfr.OutcomeSamplingSolver(game)
  compiled = spiel.OutcomeSamplingMCCFRSolver(game, epsilon=0.6, seed=1)
  theirs = {
    "OpenSpiel's MCCFR, Python": (python.iteration, iterations),
    "OpenSpiel's MCCFR, C++": (compiled.run_iteration, 50 * iterations),
  }
  rates = {}
  for _ in range(turns):
    for method in regret.METHODS:
      rule = regret.rule(tree, method, 0.02 if method != "adaptive_ftrl" else 3.0)
      lanes(tree, rule, CORES, 1000)
      spent = seconds(lambda rule=rule: lanes(tree, rule, CORES, episodes))
      rates.setdefault(method, []).append(CORES * episodes / np.array(spent))
    for name, (step, count) in theirs.items():
      spent = seconds(lambda step=step, count=count: [step() for _ in range(count)])
      rates.setdefault(name, []).append(2 * count / np.array(spent))
  print(f"Kuhn poker, {CORES} lanes on {CORES} cores; OpenSpiel has one")
  peer = np.max(rates["OpenSpiel's MCCFR, Python"], 0)[0]
  for name, found in rates.items():
    cpu, clock = np.max(found, 0)
    print(
      f"  {name}: {cpu:,.0f} episodes a CPU second, {cpu / peer:.1f} times the Python's;"
      f" {clock:,.0f} a second"
    )


def sizes(turns, episodes):
  print("liar's dice on one lane")
  for sides in range(2, 7):
    tree = trees.load(f"liars_dice(dice_sides={sides})")
    rule = regret.rule(tree, "ixomd", 1e-9)
    state, edge = regret.init(tree, rule), tree.chance.copy()
    decides = tree.infoset >= 0
    inner = np.flatnonzero(decides[tree.parent])
    inner = inner[inner > 0]
    edge[inner] = 1 / tree.children[tree.parent[inner]]
    decisions = trees.reached(tree, edge)[decides].sum()
    run = functools.partial(regret.learn, tree, rule, state, episodes)
    spent = min(seconds(run)[0] for _ in range(turns)) / episodes * 1e6
    print(
      f"  {sides} sides: {len(tree.labels):,} sets, at most {trees.longest(tree)} steps,"
      f" {decisions:.2f} decisions, {spent:.3f} us an episode, {spent / decisions:.3f} a decision"
    )


def jax_program(tree, rule):
  """Returns the compiled (state of all lanes, episodes so far, draws [T lanes steps]) -> state."""
  player, infoset, first, children, chance, before, choice, actions = map(
    jnp.asarray,
    (
      tree.player, tree.infoset, tree.first, tree.children, tree.chance,
      tree.before, tree.choice, tree.actions,
    ),
  )  # fmt: skip
  loss = jnp.asarray((tree.high - tree.returns) / (tree.high - tree.low))
  eta, gamma, base, power = (jnp.asarray(part) for part in rule)
  width, most_children = rule.base.shape[1], int(tree.children.max())
  sets = len(tree.actions)

  def step(carry, draw):
    node, total, plans, t = carry
    mover, x, count = player[node], infoset[node], children[node]
    decides = mover < trees.CHANCE
    logp_x = jnp.where(decides, t["logp"][x], -jnp.inf)
    weight = jnp.exp(logp_x)
    top = jnp.where(before[x] < 0, t["episode"], total[before[x], choice[x]])
    lag = top - total[x].sum()
    total = total.at[jnp.where(decides, x, sets)].add(lag * weight, mode="drop")
    slots = jnp.arange(most_children)
    by_chance = jnp.where(slots < count, chance[first[node] + slots], 0)
    odds = jnp.where(decides, jnp.pad(weight, (0, most_children - width)), by_chance)
    slot = jnp.minimum((draw >= jnp.cumsum(odds)).sum(), count - 1)
    plan = plans[mover] + logp_x[slot]
    plans = plans.at[jnp.where(decides, mover, 2)].set(plan, mode="drop")
    after = jnp.where(mover == trees.TERMINAL, node, first[node] + slot)
    return (after, total, plans, t), (decides, mover, x, slot, plan)

  def learn(carry, visited):
    logp, seen, most, value, below, later, end = carry
    decides, p, x, a, plan = visited
    explored = 1 / (jnp.exp(plan) + gamma[x] * (1 + seen[x, a]) ** -power)
    lost = jnp.where(later[p], 0, explored * jnp.where(p == 0, loss[end], 1 - loss[end]))
    seen_x = seen[x].at[a].add(explored)
    deepest = jnp.maximum(jnp.maximum(most[x], below[p]), seen_x.sum() / actions[x])
    old, new = eta[x] * (1 + most[x]) ** -power, eta[x] * (1 + deepest) ** -power
    change = new / old
    prior = jnp.where(jnp.arange(width) < actions[x], (1 - change) * base[x], 0)
    moved = change * logp[x] + prior
    moved = moved.at[a].add(-new * (lost - value[p]))
    normaliser = jax.scipy.special.logsumexp(moved)
    at, own = jnp.where(decides, x, sets), jnp.where(decides, p, 2)
    logp = logp.at[at].set(moved - normaliser, mode="drop")
    seen = seen.at[at].set(seen_x, mode="drop")
    most = most.at[at].set(deepest, mode="drop")
    value = value.at[own].set(normaliser / new, mode="drop")
    below = below.at[own].set(deepest, mode="drop")
    return (logp, seen, most, value, below, later.at[own].set(True, mode="drop"), end), None

  def episode(state, episode, draws):
    logp, seen, most, total = state
    t = {"logp": logp, "episode": episode}
    (end, total, _, _), visited = jax.lax.scan(step, (0, total, jnp.zeros(2), t), draws)
    carry = logp, seen, most, jnp.zeros(2), jnp.zeros(2), jnp.zeros(2, bool), end
    (logp, seen, most, *_), _ = jax.lax.scan(learn, carry, visited, reverse=True)
    return logp, seen, most, total

  def run(state, done, draws):
    def one(carry, lane_draws):
      state, t = carry
      return (jax.vmap(episode, (0, None, 0))(state, t, lane_draws), t + 1), None

    return jax.lax.scan(one, (state, done + 1.0), draws)[0][0]

  return jax.jit(run)


def starts(tree, rule, count, episodes):
  """Returns the first state of so many lanes, and the draws that numba's lanes have."""
  first, steps = regret.init(tree, rule), trees.longest(tree)
  fields = first.logp, first.seen, first.most, first.total
  state = tuple(jnp.asarray(np.broadcast_to(x, (count, *x.shape))) for x in fields)
  draws = [np.random.Generator(np.random.PCG64(s)).random((episodes, steps)) for s in range(count)]
  return state, jnp.asarray(np.stack(draws, 1))


def jax_against_numba(turns, most_lanes):
  tree = trees.load("kuhn_poker")
  rule = regret.rule(tree, "tweaked_ftrl", 0.5)
  program = jax_program(tree, rule)
  state, draws = starts(tree, rule, 4, 400)  # rounding decides draws after some thousand
  ends = program(state, 0, draws)
  for part, name in zip(ends, ("logp", "seen", "most", "total"), strict=True):
    ours = np.stack([getattr(s, name) for s in lanes(tree, rule, 4, 400)])
    np.testing.assert_allclose(part, ours, rtol=1e-9, atol=1e-9)
  print("Kuhn poker, tweaked_ftrl: lanes at once, millions of episodes a CPU second")
  count = 1
  while count <= most_lanes:
    episodes = max(100, 100_000 // count)
    state, draws = starts(tree, rule, count, episodes)
    run = functools.partial(program, state, 0, draws)
    jax.block_until_ready(run())  # compiles
    with_jax = min(seconds(lambda run=run: jax.block_until_ready(run()))[0] for _ in range(turns))
    longer = max(episodes, 400_000 // count)
    many = functools.partial(lanes, tree, rule, count, longer)
    with_numba = min(seconds(many)[0] for _ in range(turns))
    rates = count * episodes / with_jax / 1e6, count * longer / with_numba / 1e6
    print(f"  {count}: jax {rates[0]:.3f}, numba {rates[1]:.3f}")
    count *= 4


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--episodes", type=int, default=400_000)
  parser.add_argument("--iterations", type=int, default=2000)
  parser.add_argument("--lanes", type=int, default=4096, help="the most of jax's")
  flags = parser.parse_args()
  peers(flags.turns, flags.episodes, flags.iterations)
  sizes(flags.turns, flags.episodes)
  jax_against_numba(flags.turns, flags.lanes)


if __name__ == "__main__":
  main()
