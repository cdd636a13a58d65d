"""NashMP on Gemma-3 4B, text only, judged by its own frozen start.

Question: how far does a model get when its own start is the judge?
Command:  nash-jax train --config=gemma3_4b --workdir=runs/gemma3_4b
          (:lora for adapters of rank 16, :smoke for tiny random models on a CPU). docs/true_size.md
          has every command from an empty machine on.
Cost:     34.0 of 95.73 GiB a chip and 1.7 s a step at best on v5p-8, by docs/plan.md:
          nash-jax plan --config=gemma3_4b --topology=v5p-8.
Expected: nothing is published for these models, and nothing has been run here yet.

Everything is as in gemma2_2b.py, except the judge, which is the policy before training.
"""

from nash_jax.configs import gemma2_2b


def get_config(kind=""):
  c = gemma2_2b.experiment("gemma3_4b", "gemma-3-4b-it", "gemma3_4b", "gemma-3-4b-it", kind)
  if "smoke" not in kind:
    gemma2_2b.judge_by_own_start(c)
  return c
