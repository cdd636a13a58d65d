"""Which pairs should be labelled, if labels are dear?

Question: what are labels of random pairs worth beside those of an optimal design (ODPO), of greedy
          picks, and of active rounds? In a simulation of linear rewards; and with :stories on the
          storyteller's responses, as accuracy under the population against votes bought.
Command:  nash-jax design --workdir=runs/design
          nash-jax design --config=design:stories --workdir=runs/design_stories
Cost:     on two CPU cores half a minute; a few minutes with :stories; seconds with ,smoke behind.
Expected: docs/design.md
"""

from ml_collections import ConfigDict

from nash_jax import config
from nash_jax.design.rounds import DESIGNS
from nash_jax.validation import one_of

# Features of pairs: states of a plain policy as a reward model would read them, or those of the
# bundled pairwise judge.
FEATURES = {
  "stories": ("gemma", "assets:stories/judge.safetensors"),
  "states": ("bradley_terry", "assets:stories/policy.safetensors"),
}


def get_config(kind="simulation"):
  words = kind.split(",")
  for word in words:
    one_of("the word after the colon", word, ("simulation", *FEATURES, "smoke"))
  smoke, stories = "smoke" in words, [word for word in words if word in FEATURES]
  c = ConfigDict({
    "job": "design",
    "study": "collection" if stories else "simulation",
    "designs": DESIGNS,
    "budgets": (64, 128, 256, 512, 1024) if stories else (64, 256, 1024),
    "seeds": 10,
    "simulation": {
      "prompts": 200, "responses": 6, "dimension": 12, "norm": 6.0,
      "common": 4,  # directions that most prompts vary in
      "rare": 0.05,  # the share of prompts that vary in the others
    },
    "collection": _collection(stories[0] if stories else "stories", smoke),
  })  # fmt: skip
  if smoke:
    c.budgets, c.seeds = (16, 32), 2
    c.simulation.prompts = 40
  c.figures = {"design": {"size": (4, 3.2), "panels": (_panels(c),)}}
  return c


def _collection(name, smoke):
  """Four responses of the storyteller to each of its 224 prompts for training."""
  c = config.collect()
  c.sampling.max_tokens, c.steps = 56, 7
  c.features.name, c.features.model.weights = FEATURES[name]
  if smoke:
    c.sampling.max_tokens, c.steps, c.prompts.batch_size = 8, 2, 8
    c.prompts.held_out = 308
  return c


def _panels(c):
  layer = {
    "table": "means", "x": "labels", "by": "design", "label": "{design}",
    "styles": {**{name: f"C{i}o-" for i, name in enumerate(DESIGNS)}, "every pair": "k:"},
  }  # fmt: skip
  axes = {"xlabel": "labels", "xscale": "log", "xticks": c.budgets, "xticklabels": c.budgets}
  if c.study == "collection":
    layers = ({**layer, "y": "accuracy", "band": ("accuracy_low", "accuracy_high")},)
    title, label = "storyteller, held-out prompts", "accuracy under the population"
    return ({"title": title, "ylabel": label, **axes, "layers": layers},)
  return tuple(
    {
      "title": f"prompts: {prompts}", "ylabel": "regret of the worst prompt", "ylim": (0, 3.2),
      **axes,
      "layers": (
        {
          **layer, "where": {"prompts": prompts}, "y": "worst", "band": ("worst_low", "worst_high"),
        },
      ),
    }
    for prompts in ("mostly alike", "isotropic")
  )  # fmt: skip
