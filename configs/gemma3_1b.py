"""NashMP on Gemma-3 1B against a Gemma-3 4B judge, on RLHFlow's prompts.

Question: does the published experiment's recipe carry over to Gemma 3, on one host?
Command:  nash-jax train --config=gemma3_1b --workdir=runs/gemma3_1b
          (:lora for adapters of rank 16, :self for the policy's own start as judge, :lora,self for
          both, :smoke for tiny random models on a CPU). docs/true_size.md has every command from an
          empty machine on.
Cost:     6.2 of 15.75 GiB a chip and .93 s a step at best on v5e-8, by docs/plan.md:
          nash-jax plan --config=gemma3_1b --topology=v5e-8.
Expected: nothing is published for these models, and nothing has been run here yet.

Everything is as in gemma2_2b.py. Judge and policy need one tokenizer, so the judge is a Gemma 3.
"""

from nash_jax.configs import gemma2_2b


def get_config(kind=""):
  return gemma2_2b.experiment("gemma3_1b", "gemma-3-1b-it", "gemma3_4b", "gemma-3-4b-it", kind)
