"""How many inner steps T and pairs B does approximate NashMP need for an error in log π?

    nash-jax games --config=games/approximation --workdir=runs/approximation

Cost: under a minute; seconds as games/approximation:smoke. Expected: the error falls geometrically
in T and as B^(-1/2), the lemma's orders.
"""

from ml_collections import config_dict


def get_config(size="full"):
  if size not in ("full", "smoke"):
    raise ValueError(f"size must be full or smoke, got {size!r}.")
  errors = {"table": "approximation", "label": "log π_{{k+1/2}}", "style": "C0o-"}
  lemma = {"table": "approximation", "y": "lemma", "style": "k:"}
  inner, pairs = (
    {"where": {"against": against}, "x": x} for against, x in (("T", "inner"), ("B", "batch"))
  )

  def layers(axis, label):
    return (
      errors | axis | {"y": "error_half"},
      errors | axis | {"y": "error_full", "style": "C1s-", "label": "log π_{{k+1}}"},
      lemma | axis | {"label": label},
    )

  config = config_dict.ConfigDict(
    {
      "job": "games",
      "study": "approximation",
      "seed": 0,
      "contexts": None,  # one game [A A]
      "actions": 10,
      "rank": 4,
      "strength": 2.0,
      "beta": 0.1,
      "warmup": 3,  # exact iterations before the one that is approximated
      "step": 1.0,
      "inner_steps": (1, 10, 30, 60, 100, 150, 200, 300, 400, 600),
      "inner_sampled": 400,
      "step_sampled": 1.0,
      "batches": (4, 16, 64, 256, 1_024, 4_096),
      "repeats": 32,
      "figures": {
        "approximation": {
          "size": (4, 3),
          "panels": (
            (
              {
                "title": "exact inner gradients",
                "xlabel": "T: inner steps",
                "yscale": "log",
                "ylabel": "error (span, nats)",
                "layers": layers(inner, "e^({fitted_rate:.3g}·T)"),
              },
              {
                "title": "sampled inner gradients",
                "xlabel": "B: pairs a step",
                "yscale": "log",
                "xscale": "log",
                "layers": layers(pairs, "B^(-1/2); fitted {fitted_rate:.2f}"),
              },
            ),
          ),
        }
      },
    }
  )
  if size == "smoke":
    config.update(
      actions=4, inner_steps=(1, 20, 100, 200), inner_sampled=10, batches=(2, 256), repeats=8
    )
  return config
