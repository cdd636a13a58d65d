"""The short-response game: a Gemma with 64 possible responses, scored by the exact SubOpt.

Question: how close to the regularised equilibrium does a method bring a neural policy?
Command:  nash-jax train --config=short_game --config.algorithm.name=online_dpo \\
            --workdir=runs/short   (short_game:strong for strong cycles and small beta)
Cost:     a minute or two on two CPU cores.
Expected: with nash_mp, exact/suboptimality falls to a tenth of the reference's or less;
          docs/short_game.md has all methods.
"""

from nash_jax import config
from nash_jax.validation import one_of

# Four contexts, four tokens, length 3: P = σ(A − Aᵀ), A = c·U Θ_x Vᵀ / rank.
BETA = {"mild": 0.05, "strong": 0.01}  # c = 4, c = 8


def get_config(strength="mild"):
  one_of("the word after the colon", strength, BETA)
  c = config.train()
  c.steps = 4000
  c.model.preset = "tiny"
  c.model.changes = {"num_embed": 16, "embed_dim": 32, "hidden_dim": 64}
  c.model.tokenizer = "assets:short_game/tokenizer.model"
  c.model.weights = "assets:short_game/policy.safetensors"
  c.prompts.path = c.prompts.held_out_path = "assets:short_game/prompts.jsonl"
  c.prompts.max_tokens = 2
  c.prompts.batch_size = 256
  c.sampling.max_tokens = 3
  c.sampling.tokens = (7, 8, 9, 10)  # a, b, c, d
  c.judge.name = "table"
  c.judge.table = f"assets:short_game/{strength}.npy"
  c.judge.first_token = 7
  c.judge.table_tokens = 4
  c.algorithm.beta = BETA[strength]
  c.algorithm.eta = 0.2 if strength == "mild" else 0.1
  c.algorithm.kappa = 0.01
  c.optimizer.learning_rate, c.optimizer.b1 = 1e-3, 0.0  # momentum makes last iterates circle
  c.evaluation.every = 100
  c.evaluation.prompts = 4
  c.evaluation.exact = True
  c.checkpoint.every = 2000
  return c
