"""Online against offline, controlled: the same loss on pairs of its own, and on pairs of a file.

Question: what does an online run have that a file of pairs lacks: fresh pairs, better pairs, or
          their order? And what does a win rate against the reference hide?
Command:  the lines of docs/online_offline.md: nash-jax train --config=online_offline:online and
          :replay, nash-jax collect --config=online_offline:reference and :final, then
          nash-jax compare --config=online_offline and :order. Before each word but the first of
          `compare`, `stories,` does the same on the storyteller; behind it `,smoke` is a minute.
          `strong,` does it on the strong game.
Cost:     on two CPU cores a quarter of an hour; as much on the storyteller.
Expected: docs/online_offline.md
"""

from nash_jax import config
from nash_jax.configs import short_game, stories, stories_compare
from nash_jax.validation import one_of

FOLDER = "runs/online_offline"
KINDS = ("online", "replay", "reference", "final", "tables", "order")
GPO = ("squared", "logistic", "hinge", "exponential", "truncated_quadratic", "savage")


def get_config(kind="tables"):
  words = kind.split(",")
  parts = [word for word in words if word in KINDS] or ["tables"]
  for word in words:
    one_of("the word after the colon", word, (*KINDS, "stories", "strong", "smoke"))
  on_stories, smoke = "stories" in words, "smoke" in words
  game = "stories" if on_stories else "strong" if "strong" in words else "mild"
  place = folder(game)
  online = _stories() if on_stories else _short_game(game)
  if smoke:
    online.steps = online.evaluation.every = online.checkpoint.every = 4
    online.prompts.batch_size = 8
  if parts[0] == "online":
    online.record_pairs = True
    return online
  if parts[0] == "replay":
    online.algorithm.name = "gpo"
    online.update_from_flattened_dict(_file(place, "online", **{"pairs.window": 1}))
    return online
  if parts[0] in ("reference", "final"):
    return _collect(online, f"{place}/online" if parts[0] == "final" else "", on_stories)
  if parts[0] == "tables" and not on_stories:
    return _tables(online, place, smoke)
  return _order(online, place, on_stories, smoke)


def folder(strength):
  """Returns where the files of a game lie."""
  return FOLDER if strength == "mild" else f"{FOLDER}_{strength}"


def _short_game(strength):
  """Online IPO by the Gemma of the short game, on 65,536 pairs."""
  c = short_game.get_config(strength)
  c.algorithm = config.train().algorithm
  c.algorithm.update(name="online_ipo", beta=short_game.BETA[strength])
  c.steps, c.prompts.batch_size, c.evaluation.every = 1024, 64, 32
  c.optimizer.update(learning_rate=1e-3, schedule="cosine", final_fraction=0.0)
  return c


def _stories():
  """Online IPO of the storyteller against the judge that was fitted to the population's votes."""
  c = stories.get_config()
  c.algorithm = config.train().algorithm
  c.algorithm.update(name="online_ipo", beta=stories.get_config().algorithm.beta)
  c.steps, c.checkpoint.every = 40, 40
  c.prompts.held_out, c.evaluation.prompts = 160, 64
  return c


def _collect(online, weights, on_stories):
  """As many independent pairs as the online run sees, of its start or its end, by the truth."""
  c = config.collect()
  c.prompts, c.model = online.prompts, {**online.model.to_dict(), "weights": c.model.weights}
  c.sampling.update(max_tokens=online.sampling.max_tokens, tokens=online.sampling.tokens, samples=2)
  c.judge = online.judge
  if on_stories:
    c.judge = {**c.judge.to_dict(), "name": "population"}
  c.sources = {
    "policy": {
      "weights": weights or online.model.weights, "temperature": online.sampling.temperature,
    }
  }  # fmt: skip
  c.steps, c.seed = online.steps, 1
  return c


def _file(place, name, **changes):
  return {"pairs.task": "tokens", "pairs.path": f"{place}/{name}/pairs.jsonl", **changes}


def _tables(online, place, smoke):
  """Tables of logits on the short game: both sorts of pairs, all losses, exact."""
  b = online
  b.optimizer = config.optimizer(
    learning_rate=0.02, schedule="cosine", final_fraction=0.0, clip_norm=1e9
  )
  b.steps, b.evaluation.every = (4, 4) if smoke else (4000, 100)
  b.prompts.batch_size = 8 if smoke else 256
  runs = [{"label": "online squared", "algorithm.name": "online_ipo"}]
  for name in ("reference", "final"):
    gpo = {"algorithm.name": "gpo", **_file(place, name)}
    losses = GPO if name == "reference" else GPO[:1]
    runs += [{"label": f"{f}, pairs of {name}", "algorithm.f": f, **gpo} for f in losses]
    label = f"best of two, pairs of {name}"
    runs.append({**gpo, "label": label, "algorithm.name": "best_of_two"})
  runs.append({"label": "NashMP", "algorithm.name": "nash_mp", "algorithm.eta": 0.2,
               "algorithm.kappa": 0.01})  # fmt: skip
  return config.compare(b, runs, kinds=("tabular",), seeds=2 if smoke else 3)


def _order(online, place, on_stories, smoke):
  """The online run's own pairs in its order, in others, and pairs of its start and its end."""
  gpo = {"algorithm.name": "gpo", "algorithm.f": "squared"}
  batch = online.prompts.batch_size
  windows = {"in order": 1, "windows of 10 steps": 10 * batch, "windows of 100 steps": 100 * batch}
  windows = {name: size for name, size in windows.items() if size < online.steps * batch}
  windows["shuffled"] = 0
  runs = [{"label": "online", "algorithm.name": "online_ipo"}]
  runs += [
    {"label": f"online's pairs, {name}", **gpo, **_file(place, "online"), "pairs.window": window}
    for name, window in windows.items()
  ]
  runs += [
    {"label": f"pairs of {name}", **gpo, **_file(place, name)} for name in ("reference", "final")
  ]
  runs += [
    {"label": f"best of two, {name}", "algorithm.name": "best_of_two", **_file(place, file)}
    for name, file in (("online's pairs", "online"), ("pairs of reference", "reference"))
  ]
  c = config.compare(online, runs, seeds=1)
  return stories_compare.meet(c, prompts=96, most=8 if smoke else 0) if on_stories else c
