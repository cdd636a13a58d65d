"""docs/algorithms.md agrees with the code: its overview, resting points, and added algorithms."""

import re

import jax
import numpy as np
import pytest
from enumeration import config, distribution, enumerated, game, whole
from jax import numpy as jnp
from paths import ROOT

from nash_jax.games import preference
from nash_jax.objectives import algorithms, losses

PAGE = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
PLAYERS = {
  "π": "policy",
  "π, flattened": "policy",
  "π_ref": "reference",
  "file μ": "data",
  "target": "target",
  "mixture m": "mixture",
  "frozen π̂": "opponent",
  "π_t, then π_{t+1/2}": "opponent",
  "y's other samples": None,
  "": None,
}


def overview() -> dict[str, list[str]]:
  """Returns the cells of the first table's lines after the name, by name."""
  lines = [line for line in PAGE.split("## Symbols")[0].splitlines() if line.startswith("| [`")]
  cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
  return {re.match(r"\[`(\w+)`\]", first)[1]: rest for first, *rest in cells}


def test_the_overview_is_the_table():
  assert list(overview()) == list(algorithms.ALGORITHMS)
  for name, (y, opponent, arms, loss, _, copied, _) in overview().items():
    method = algorithms.get(name)
    assert (PLAYERS[y], PLAYERS[opponent]) == (method.player, method.opponent), name
    assert loss.startswith("policy gradient") == method.on_policy, name
    assert not method.on_policy or (arms == "1") == (method.opponent is not None), name
    still = config(target_update="periodic", reference_period=0)
    assert (copied != "") == (
      method.copy_schedule(still, 6) != {} or method.target_ema(config())
    ), name


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_a_method_rests_where_the_page_says(name):
  """The expected gradient is zero, opponent and target having caught up, there alone."""
  method, a = algorithms.get(name), config(samples=int(algorithms.get(name).minimum["samples"]))
  rests = overview()[name][-1]
  with jax.enable_x64(True):
    table, rewards, players = game()
    if rests.endswith("without β"):  # a cycle of four: equal chances are its equilibrium
      cycle = jnp.array([[0, 1, 0, -1], [-1, 0, 1, 0], [0, -1, 0, 1], [1, 0, -1, 0]])
      table = jnp.broadcast_to(0.5 + 0.3 * cycle, table.shape)
    ref, mu = whole(players["reference"]), jnp.exp(whole(players["data"]))
    star = jnp.log(preference.equilibrium(table, jnp.exp(ref), a.beta))

    @jax.jit
    def gradient(theta):
      here = {**players, "target": theta, "opponent": theta}
      return jax.grad(lambda p: enumerated(method, a, table, rewards, {**here, "policy": p}, 1))(
        theta
      )

    def answered(theta):
      """A step towards the best response to the opponent that this policy makes."""
      here = {**players, "policy": theta}
      opponent = jnp.exp(distribution(method.opponent or method.player, here, 1, a.mixture))
      return 0.7 * theta + 0.3 * (ref + preference.win_rates(table, opponent) / a.beta)

    place = {
      "π*": lambda: star,
      "best": lambda: jax.lax.fori_loop(0, 200, lambda _, theta: answered(theta), star),
      "π_ref·exp(R/β)": lambda: ref + rewards / a.beta,
      "the": lambda: jnp.zeros_like(star),
      "2μ·P(·≻μ)": lambda: jnp.log(2 * mu * preference.win_rates(table, mu)),
      "no": lambda: None,
    }[rests.split(" ")[0]]()
    if place is not None:
      np.testing.assert_allclose(gradient(place), 0, atol=1e-9)
    if place is not star:
      assert np.max(np.abs(gradient(star))) > 1e-3
    assert np.max(np.abs(gradient(players["policy"]))) > 1e-3


@pytest.fixture
def added(monkeypatch):
  """The table of algorithms with those that the page adds, run as they stand there."""
  for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
    if block.startswith("def "):
      space = dict(vars(losses))
      exec(block, space)
      name = re.match(r"def (\w+)", block)[1]
      monkeypatch.setattr(losses, name, space[name], raising=False)
    else:
      for name, method in eval(f"{{{block}}}", dict(vars(algorithms))).items():
        assert name not in algorithms.ALGORITHMS
        monkeypatch.setitem(algorithms.ALGORITHMS, name, method)


def stated(name, a, table, players):
  """The objective of an added algorithm, written out from its definition."""
  logp = whole(players["policy"])
  r, ref = logp - whole(players["reference"]), jnp.exp(whole(players["reference"]))
  delta = r[:, :, None] - r[:, None, :]
  if name == "lagged_self_play":
    won = jnp.einsum("xa,xab,xb->x", jnp.exp(logp), table, jnp.exp(whole(players["lagged"])))
    return jnp.mean(a.beta * jnp.sum(jnp.exp(logp) * r, -1) - won)
  if name == "ipo":
    return jnp.mean(jnp.einsum("xa,xb,xab->x", ref, ref, (delta - (table - 0.5) / a.beta) ** 2))
  mu = jax.lax.stop_gradient(jnp.exp(logp))
  hinge = table * jnp.maximum(0, 1 - a.beta * delta)
  hinge += (1 - table) * jnp.maximum(0, 1 + a.beta * delta)
  return jnp.mean(jnp.einsum("xa,xb,xab->x", mu, mu, hinge))


@pytest.mark.parametrize("name", ["ipo", "hinge", "lagged_self_play"])
@pytest.mark.usefixtures("added")
def test_the_algorithms_that_the_page_adds_follow_their_objectives(name):
  method = algorithms.get(name)
  with jax.enable_x64(True):
    table, rewards, players = game()
    players["lagged"] = players["opponent"]
    objectives = (
      lambda p: enumerated(method, config(), table, rewards, {**players, "policy": p}, 1),
      lambda p: stated(name, config(), table, {**players, "policy": p}),
    )
    got, expected = (jax.jit(jax.grad(f))(players["policy"]) for f in objectives)
  assert np.max(np.abs(expected)) > 1e-3
  np.testing.assert_allclose(got, expected, atol=1e-10)
