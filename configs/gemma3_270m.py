"""NashMP on Gemma-3 270M against a Gemma-3 1B judge, the smallest pair of one tokenizer.

Question: does the smallest Gemma move towards what a judge four times its size prefers?
Command:  nash-jax train --config=gemma3_270m --workdir=runs/gemma3_270m
          (:lora for adapters of rank 16, :self for the policy's own start as judge, :lora,self for
          both, :smoke for tiny random models on a CPU). docs/true_size.md has every command from an
          empty machine on.
Cost:     3.8 of 15.75 GiB a chip and .30 s a step at best on v5e-4, by docs/plan.md:
          nash-jax plan --config=gemma3_270m --topology=v5e-4.
Expected: nothing is published for these models, and nothing has been run here yet.

Everything is as in gemma2_2b.py. Judge and policy need one tokenizer, so the judge is a Gemma 3.
"""

from nash_jax.configs import gemma2_2b


def get_config(kind=""):
  return gemma2_2b.experiment("gemma3_270m", "gemma-3-270m-it", "gemma3_1b", "gemma-3-1b-it", kind)
