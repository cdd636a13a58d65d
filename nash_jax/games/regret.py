"""Learning games of imperfect information from their episodes alone: five methods, one update.

Both players hold a policy, play an episode with them, and move them where it went. A method is a
row: how η and γ depend on the information set, and where policies start. Losses lie in [0, 1] and
count at a player's last decision. The averages of the policies approach an equilibrium.

Sources: IXOMD is Kozuno et al. (2106.06279); Balanced OMD is Bai et al. (2202.01752); Balanced and
Adaptive FTRL, and its tweak, are Fiegel et al. (2212.12567).

Axes as in `trees`: X information sets of both players, A the most actions of a set.
"""

import os
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from nash_jax.games import balance, checks, trees
from nash_jax.games.trees import Tree
from nash_jax.validation import one_of, require

_CHUNK = 4096  # episodes whose draws are held at once
_FORMAT = 1  # of saved states


class Rule(NamedTuple):
  """A method in a game, at given rates.

  Examples:
    >>> from nash_jax.games import regret, trees
    >>> regret.rule(trees.load("kuhn_poker"), "ixomd", eta=0.02).power
    0.0

  Attributes:
    eta: η of each set before its first visit.
    gamma: γ of it.
    base: log-probabilities of μ⁰, in nats; -inf beyond a set's own actions.
    power: how η and γ fall: as (1 + P̃)^-power.
  """

  eta: Float[np.ndarray, "X"]
  gamma: Float[np.ndarray, "X"]
  base: Float[np.ndarray, "X A"]
  power: float


class State(NamedTuple):
  """Where learning is.

  Examples:
    >>> from nash_jax.games import regret, trees
    >>> kuhn = trees.load("kuhn_poker")
    >>> regret.init(kuhn, regret.rule(kuhn, "ixomd", eta=0.02), seed=1).episodes
    0

  Attributes:
    logp: log-probabilities of the current policies; -inf beyond a set's own actions.
    seen: P̃, the sum of 1/(plan + γ) over visits.
    most: its largest mean over a set's actions, in the set or below it.
    total: sums of plans over episodes, as of each set's last visit.
    episodes: how many there have been.
    seed: of the draws. Episode t has the same draws however many are run at once.
  """

  logp: Float[np.ndarray, "X A"]
  seen: Float[np.ndarray, "X A"]
  most: Float[np.ndarray, "X"]
  total: Float[np.ndarray, "X A"]
  episodes: int
  seed: int


def _ones(tree: Tree) -> Float[np.ndarray, "X"]:
  return np.ones(len(tree.actions))


_OfGame = Callable[[Tree], Float[np.ndarray, "..."]]
# {method: (what multiplies η and γ at each set, μ⁰, the power of a Rule)}
METHODS: dict[str, tuple[_OfGame, _OfGame, float]] = {
  "ixomd": (_ones, trees.uniform, 0.0),
  "balanced_omd": (balance.plan, trees.uniform, 0.0),
  "balanced_ftrl": (lambda tree: 1 / balance.transition(tree), balance.shares, 0.0),
  "adaptive_ftrl": (_ones, trees.uniform, 1.0),
  "tweaked_ftrl": (_ones, trees.uniform, 0.5),
}


def rule(
  tree: Tree,
  method: str,
  eta: checks.Number,
  gamma: checks.Number | None = None,
  exact_base: bool = False,
) -> Rule:
  """Returns a method in a game, at the rates η and γ of both players.

  Examples:
    >>> from nash_jax.games import regret, trees
    >>> regret.rule(trees.load("kuhn_poker"), "balanced_ftrl", eta=0.1).eta[:3].round(3).tolist()
    [0.3, 0.3, 0.3]

  Args:
    method: a name of METHODS.
    eta: > 0.
    gamma: ≥ 0; η/20 without, as in the published experiment.
    exact_base: of `balanced_ftrl`: η and μ⁰ with which, where all histories are equally long, its
      update has the entropy Σ q log q of q(x, a) = p*(x) μ(x, a). Else those of the authors' code.

  Raises:
    ValueError: an unknown method, a rate out of its range, or an exact base of another method.
  """
  one_of("method", method, METHODS)
  scale_of, base_of, power = METHODS[method]
  rate = float(checks.number("eta", eta))
  explored = float(checks.number("gamma", rate / 20 if gamma is None else gamma, zero=True))
  scale, base = scale_of(tree), base_of(tree)
  etas = rate * scale
  if exact_base:
    fix = "Leave it False."
    require(method == "balanced_ftrl", "exact_base", "the method balanced_ftrl", method, fix)
    etas, base = etas / balance.decisions_left(tree), balance.entropy_base(tree)
  with np.errstate(divide="ignore"):  # slots beyond a set's own actions
    return Rule(etas, explored * scale, np.log(base), power)


def theory(tree: Tree, method: str, episodes: int, delta: float = 0.05) -> tuple[float, float]:
  """Returns the rates (η, γ) with which a method's regret bound holds with probability 1 - δ.

  They are those of the player with more actions and decisions. Balanced OMD's constants, and both
  rates of Tweaked FTRL, which has no bound, are 1.

  Examples:
    >>> from nash_jax.games import regret, trees
    >>> eta, gamma = regret.theory(trees.load("kuhn_poker"), "ixomd", episodes=10_000)
    >>> round(eta, 4), round(gamma, 4)
    (0.0042, 0.0128)

  Args:
    episodes: T, for which the rates are chosen.

  Raises:
    ValueError: an unknown method, or no number of episodes.
  """
  one_of("method", method, METHODS)
  t = checks.count("episodes", episodes)
  sets = np.bincount(tree.owner).max()
  a, total = int(tree.actions.max()), float(np.bincount(tree.owner, tree.actions).max())
  h = int(tree.depth.max()) + 1
  iota, later = np.log(3 * total / delta), np.log(3 * total * t / delta)
  doublings = 1 + np.log2(1 + t)
  rates = {
    "ixomd": (np.log(a) / (t * h * a), np.log(3 * sets * a / delta) / (2 * t * a)),
    "balanced_omd": (sets * a / (h**3 * t), sets * a / (h * t)),
    "balanced_ftrl": (2 * h * np.log(total) / (total * t), h * iota / (2 * total * t)),
    "adaptive_ftrl": tuple(4 * later * t * x / (doublings * total) for x in (1, h)),
    "tweaked_ftrl": (1.0, 1.0),
  }
  eta, gamma = np.sqrt(rates[method])
  return float(eta), float(gamma)


def init(tree: Tree, rule: Rule, seed: int = 0) -> State:
  """Returns the state in which a method starts: at μ⁰, before the first episode.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import regret, trees
    >>> kuhn = trees.load("kuhn_poker")
    >>> state = regret.init(kuhn, regret.rule(kuhn, "ixomd", eta=0.02))
    >>> np.exp(state.logp[0]).round(3).tolist()
    [0.5, 0.5]

  Args:
    seed: of the draws of all episodes.

  Raises:
    ValueError: a seed that is no whole number ≥ 0.
  """
  zeros = np.zeros_like(rule.base)
  seed = checks.count("seed", seed, least=0)
  return State(rule.base.copy(), zeros, np.zeros(len(tree.actions)), zeros.copy(), 0, seed)


def learn(tree: Tree, rule: Rule, state: State, episodes: int) -> State:
  """Returns the state after so many more episodes. The state that is given stays as it is.

  An episode costs as many operations as its length times the actions, whatever the game's size.

  Examples:
    >>> from nash_jax.games import exact, regret, trees
    >>> kuhn = trees.load("kuhn_poker")
    >>> rule = regret.rule(kuhn, "ixomd", eta=0.02)
    >>> state = regret.learn(kuhn, rule, regret.init(kuhn, rule), 20_000)
    >>> exact.gap(kuhn, regret.average(kuhn, state)) < 0.1
    True

  Args:
    episodes: ≥ 1.

  Raises:
    ValueError: numba is not installed, a number of episodes that is none, or a state of another
      game.
  """
  try:
    from nash_jax.games.episodes import run
  except ImportError as error:
    fix = "Install it by `pip install 'nash_jax[games]'`."
    raise ValueError(f"numba: expected this package, got {error}. {fix}") from error
  expected, got = f"one of {tree.name}, {rule.base.shape}", state.logp.shape
  require(got == rule.base.shape, "state", expected, got, "Begin with init.")
  count, steps = checks.count("episodes", episodes), trees.longest(tree)
  loss = (tree.high - tree.returns) / (tree.high - tree.low)
  nodes = tree.player, tree.infoset, tree.first, tree.children, tree.chance, loss
  sets = tree.before, tree.choice, tree.actions
  arrays = tuple(np.array(field) for field in state[:4])  # copies
  bits = np.random.PCG64(state.seed)
  bits.advance(state.episodes * steps)  # each episode has as many draws as the longest needs
  generator = np.random.Generator(bits)
  for start in range(0, count, _CHUNK):
    draws = generator.random((min(_CHUNK, count - start), steps))
    run(nodes + sets, tuple(rule), arrays, state.episodes + start, draws)
  return State._make([*arrays, state.episodes + count, state.seed])


def current(state: State) -> Float[np.ndarray, "X A"]:
  """Returns the policies that the next episode is played with.

  Examples:
    >>> from nash_jax.games import regret, trees
    >>> kuhn = trees.load("kuhn_poker")
    >>> state = regret.init(kuhn, regret.rule(kuhn, "ixomd", eta=0.02))
    >>> regret.current(state).shape
    (12, 2)
  """
  return np.exp(state.logp)


def average(tree: Tree, state: State) -> Float[np.ndarray, "X A"]:
  """Returns the average policies: their plans are the means of the plans of all episodes.

  These are the policies that the guarantees speak of. A set that no plan has reached has the
  current policy. The state stays as it is.

  Examples:
    >>> from nash_jax.games import regret, trees
    >>> kuhn = trees.load("kuhn_poker")
    >>> rule = regret.rule(kuhn, "ixomd", eta=0.02)
    >>> state = regret.learn(kuhn, rule, regret.init(kuhn, rule), 100)
    >>> regret.average(kuhn, state).sum(1).round(12).tolist() == [1.0] * 12
    True
  """
  policy, total = current(state), state.total.copy()
  for sets in trees.levels(tree.depth):  # parents first
    inner = tree.before[sets] >= 0
    top = np.where(inner, total[tree.before[sets], tree.choice[sets]], float(state.episodes))
    lag = top - total[sets].sum(1)
    total[sets] += lag[:, None] * policy[sets]
  sums = total.sum(1, keepdims=True)
  return np.divide(total, sums, out=policy, where=sums > 0)


def save(path: str | os.PathLike[str], tree: Tree, state: State) -> None:
  """Writes a state as a NumPy archive (.npz), from which learning goes on bit for bit.

  Examples:
    >>> import pathlib, tempfile
    >>> from nash_jax.games import regret, trees
    >>> kuhn = trees.load("kuhn_poker")
    >>> state = regret.init(kuhn, regret.rule(kuhn, "ixomd", eta=0.02), seed=3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = pathlib.Path(folder) / "state.npz"
    ...   regret.save(path, kuhn, state)
    ...   regret.load(path, kuhn).seed
    3
  """
  with open(path, "wb") as file:
    np.savez(file, format=_FORMAT, game=tree.name, **state._asdict())


def load(path: str | os.PathLike[str], tree: Tree) -> State:
  """Reads a state of `save`.

  Examples:
    >>> import pathlib, tempfile
    >>> from nash_jax.games import regret, trees
    >>> kuhn = trees.load("kuhn_poker")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = pathlib.Path(folder) / "state.npz"
    ...   rule = regret.rule(kuhn, "ixomd", eta=0.02)
    ...   regret.save(path, kuhn, regret.learn(kuhn, rule, regret.init(kuhn, rule), 10))
    ...   regret.load(path, kuhn).episodes
    10

  Raises:
    ValueError: the file is no such state, or one of another game.
  """
  try:
    with np.load(pathlib.Path(path), allow_pickle=False) as file:
      data: dict[str, Any] = {name: file[name] for name in file.files}
  except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(f"{path}: expected a state that regret.save wrote: {error}") from error
  names = {*State._fields, "format", "game"}
  fix = "Save it by regret.save."
  require(set(data) == names, str(path), f"{sorted(names)}", sorted(data), fix)
  require(int(data["format"]) == _FORMAT, f"{path}: format", f"{_FORMAT}", int(data["format"]), fix)
  require(str(data["game"]) == tree.name, f"{path}: game", tree.name, str(data["game"]), fix)
  state = State(**{name: data[name] for name in State._fields})
  shape, got = trees.legal(tree).shape, state.logp.shape
  require(got == shape, f"{path}: logp", f"shape {shape}", got, fix)
  return state._replace(episodes=int(state.episodes), seed=int(state.seed))
