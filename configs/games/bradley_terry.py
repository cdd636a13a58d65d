"""Why does a reward fail where preferences cycle?

    nash-jax games --config=games/bradley_terry --workdir=runs/bradley_terry

Cost: seconds, fewer as games/bradley_terry:smoke. Expected: as β falls the reward's policy becomes
pure, the equilibrium stays mixed; one vote among 30 flips the reward's policy and hardly moves the
equilibrium; sampling one pair more often changes the reward's fit and not the preferences.
"""

from ml_collections import config_dict


def get_config(size="full"):
  if size not in ("full", "smoke"):
    raise ValueError(f"size must be full or smoke, got {size!r}.")
  beta, votes = 0.01, 30

  def panel(study, title, **axes):
    return {
      "title": title,
      **axes,
      "layers": tuple(
        {
          "table": "bradley_terry",
          "where": {"study": study},
          "x": "value",
          "y": f"{kind}_{y}",
          "style": f"C{y}{style}",
          "label": f"{kind} {'RPS'[y]}" if study == "beta" else "_",
        }
        for kind, style in (("reward", "--"), ("equilibrium", "-"))
        for y in range(3)
      ),
    }

  config = config_dict.ConfigDict(
    {
      "job": "games",
      "study": "bradley_terry",
      "payoffs": (0.5, 1.0, 0.8),  # of winning with rock, paper, scissors
      "betas": (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005),
      "beta": beta,
      "votes": votes,
      "extra_votes": (-3, -2, -1, 0, 1, 2, 3),
      "law_weights": (0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0, 8.0),
      "figures": {
        "bradley_terry": {
          "size": (3.6, 3),
          "panels": (
            (
              panel("beta", "a reward picks one, the game mixes", xlabel="β", xscale="log"),
              panel(
                "extra_votes",
                f"one datum, β = {beta:g}",
                xlabel=f"extra votes on one of three pairs of {votes}",
              ),
              panel(
                "law",
                "the sampling law",
                xlabel="times pair (0, 1) is drawn",
                xscale="log",
                xticks=(0.25, 0.5, 1, 2, 4, 8),
                xticklabels=("¼", "½", "1", "2", "4", "8"),
              ),
            ),
          ),
        }
      },
    }
  )
  if size == "smoke":
    config.update(betas=(1.0, 0.1, 0.01), extra_votes=(0, 1), law_weights=(1.0, 2.0))
  return config
