"""What each field means, for docs/fields.md: {job: {field: meaning}}.

A field that a job does not have here means what it means in `train` or `fit`.
"""

_TRAIN = {
  "algorithm.advantage": "What `grpo` takes advantages of: `wins` in the group, or `scores`.",
  "algorithm.behaviour_temperature": (
    "Multiplies `sampling.temperature` when y is drawn, for losses that allow it."
  ),
  "algorithm.beta": "β, the weight of KL to the reference.",
  "algorithm.centre_log_ratios": (
    "Subtract the mean log-ratio of the prompt's other responses: less variance where KL is large."
  ),
  "algorithm.clip_high": "The ratio of `grpo` is clipped at 1 plus this, where `updates` > 1.",
  "algorithm.clip_low": "The ratio of `grpo` is clipped at 1 less this, where `updates` > 1.",
  "algorithm.eta": "η: β / η is the weight of KL to the target.",
  "algorithm.f": "The loss of `gpo`: `squared` is IPO, `logistic` DPO, `hinge` SLiC.",
  "algorithm.history": "The weight, in the centre of `mnpo`, of the older of its two policies.",
  "algorithm.kappa": "κ, the rate at which the target follows the policy.",
  "algorithm.kappa_offset": "The offset of `harmonic`.",
  "algorithm.kappa_schedule": "`harmonic`: κ is offset / (k + offset) at step k.",
  "algorithm.kl": (
    "The KL of `grpo`: `score`, of whole responses in the advantage, or `k3`, a sum over tokens"
    " outside of it."
  ),
  "algorithm.labels": "`soft`: losses learn from P. `sampled`: from 1 with probability P, else 0.",
  "algorithm.mixture": "The weight of the reference in the mixture of `nash_md` and `ipo_md`.",
  "algorithm.name": "[The method](algorithms.md).",
  "algorithm.normalise": (
    "Divide the advantages of `grpo` by their deviation in the `group` of a prompt's responses, or"
    " in the whole `batch`."
  ),
  "algorithm.reference_period": (
    "The reference becomes the policy every so many steps. By default 50 for `mpo`, else never."
  ),
  "algorithm.reward_to_go": "A token's KL coefficient counts only this and later tokens.",
  "algorithm.samples": (
    "Responses to a prompt in all; an opponent draws half of them, if there is one. By default as"
    " few as the method can use: 3 for `egpo`, else 2."
  ),
  "algorithm.step": (
    "s of `sppo`, `mpo`, `inpo` and `mnpo`; but for `sppo` at most 1 / β. By default 5, or 0.5 / β"
    " if 5 would be more than that."
  ),
  "algorithm.target_period": "Steps between copies of the target, with `periodic`.",
  "algorithm.target_update": (
    "`ema`: the target follows the policy by κ. `periodic`: it is copied every `target_period`"
    " steps."
  ),
  "algorithm.updates": "Optimiser steps of `grpo` on each batch.",
  "checkpoint.allow": "Fields in which a continued run may differ, such as `('prompts.path',)`.",
  "checkpoint.every": "Steps between checkpoints.",
  "checkpoint.keep": "How many of the newest checkpoints to keep; the best is always kept.",
  "evaluation.every": "Steps between evaluations on held-out data.",
  "evaluation.exact": "Evaluate over every response, in a game of the table judge that allows it.",
  "evaluation.prompts": "How many held-out prompts to evaluate on.",
  "evaluation.texts": "How many of them to record in `samples.jsonl`.",
  "judge.answers": 'The pieces that mean "the first" and "the second".',
  "judge.first_token": (
    "Table judges: the token of digit 0. A response's first tokens are the digits of its action."
  ),
  "judge.gpm.blocks": "Judge `gpm`: half the length of a response's vector, as it was fitted.",
  "judge.gpm.prompt_scale": "Judge `gpm`: whether the prompt weights the blocks, as it was fitted.",
  "judge.http.backoff": "Seconds before the first retry, doubled each time; or `Retry-After`.",
  "judge.http.model": "The server's name of the model.",
  "judge.http.retries": "How often to try a failed request again.",
  "judge.http.timeout": "Seconds for a request, up to its reply's last byte, and the longest wait.",
  "judge.http.url": "The address of an OpenAI-compatible server's chat completions, in an arena.",
  "judge.http.workers": "Requests at a time.",
  "judge.max_tokens": "The width of the judge's whole prompt; longer parts are cut.",
  "judge.mesh.data": "As `mesh.data`, for the judge on the same devices.",
  "judge.mesh.fsdp": "As `mesh.fsdp`, for the judge.",
  "judge.mesh.tensor": "As `mesh.tensor`, for the judge.",
  "judge.micro_batches": "Parts of a batch that a Gemma judge evaluates one after another.",
  "judge.name": "Which judge ([judges](judges.md)), or `module:function` for your own.",
  "judge.table": "Table judges: an `.npy` file of P [X A A] ([judges](judges.md#the-table)).",
  "judge.table_tokens": "Table judges: the base of the digits.",
  "judge.template": "The question: a name or a text file ([judges](judges.md#templates)).",
  "judge.votes": "Judge `human`, in an arena: a workdir of `nash-jax vote`.",
  "mesh.data": "Devices that share the batch.",
  "mesh.fsdp": "Devices that share the parameters, and the batch.",
  "mesh.tensor": "Devices that share the heads, features and vocabulary.",
  "model.changes": 'Single fields of the architecture to replace, such as `{"num_embed": 256}`.',
  "model.dtype": "The type of compute; trained parameters are float32.",
  "model.logit_chunk": "Response columns whose logits exist at one time: fewer take less memory.",
  "model.lora.alpha": "Adapters are scaled by alpha / rank.",
  "model.lora.init": "A folder of PEFT's whose adapters a run starts from ([LoRA](lora.md)).",
  "model.lora.rank": "The rank of the adapters that `train` and `fit` train ([LoRA](lora.md)).",
  "model.preset": "The architecture, such as `gemma3_1b`.",
  "model.remat": "Recompute activations in the backward pass: less memory, more time.",
  "model.template": "The chat template ([data](data.md#chat-templates)).",
  "model.tokenizer": "A SentencePiece file, `tokenizer.model`.",
  "model.weights": (
    "A file or folder, a run (`runs/x`, `runs/x@target`), or `''` for random weights"
    " ([weights](weights.md))."
  ),
  "on_record_error": (
    "If metrics, samples or TensorBoard cannot be written: `stop`, or `continue` without them."
  ),
  "optimizer.b1": "AdamW: the decay of the first moment.",
  "optimizer.b2": "AdamW: the decay of the second moment.",
  "optimizer.clip_norm": "The largest norm of the gradient, over all parameters.",
  "optimizer.eps": "AdamW: added to the root of the second moment.",
  "optimizer.final_fraction": "`linear` and `cosine` end at this fraction of the learning rate.",
  "optimizer.learning_rate": "The learning rate after warm-up.",
  "optimizer.micro_batches": "Parts of a batch, one after another: less memory, the same result.",
  "optimizer.name": "Optax's optimiser.",
  "optimizer.schedule": "The learning rate after warm-up: constant, or falling to the last step.",
  "optimizer.warmup_steps": "Steps in which the learning rate rises to its full value.",
  "optimizer.weight_decay": "AdamW: decay of the parameters to zero, not to the reference.",
  "pairs.cache_reference": (
    "Compute the reference's log-probabilities of the pairs once, before the first step."
  ),
  "pairs.held_out": "How many pairs to evaluate alone, from the end of the file.",
  "pairs.path": "The file of pairs that `gpo` and `best_of_two` learn from ([data.md](data.md)).",
  "pairs.task": "How it is written: `preferences` are texts, `tokens` are token ids.",
  "pairs.window": (
    "So many consecutive pairs are shuffled among themselves: 1 keeps the order of the file."
  ),
  "profile": "Write a trace of the third and fourth step to `workdir/profile`.",
  "prompts.bad": "A record that cannot be read: `stop` with its line, or `skip` and count it.",
  "prompts.batch_size": "Prompts a step, over all devices.",
  "prompts.duplicates": "`drop`: do not train on a prompt that is held out.",
  "prompts.held_out": "How many prompts to hold out, from the end.",
  "prompts.held_out_path": "Files of prompts to hold out instead.",
  "prompts.max_tokens": "The width of a prompt, `<bos>` and template included.",
  "prompts.overflow": "Longer prompts: `drop` them, or `cut` them to `<bos>` and the end.",
  "prompts.path": "Files, folders or a mixture of them ([data](data.md#files)).",
  "prompts.task": "What the files hold ([data](data.md#prompts)).",
  "record_pairs": "Write the pairs that are trained on, in order, to `workdir/pairs.jsonl`.",
  "sampling.markers": "Markers that may be sampled too ([data](data.md#chat-templates)).",
  "sampling.max_tokens": "The longest response.",
  "sampling.temperature": "The temperature of the distribution that is sampled from, and trained.",
  "sampling.tokens": "The only ids that may be sampled; `()` for every piece.",
  "sampling.top_k": "Sample from the k most probable ids.",
  "sampling.top_p": "Sample from the most probable ids that together have probability p.",
  "seed": "Decides all randomness.",
  "steps": "Training steps.",
  "tracker": "`wandb`: also log to [Weights & Biases](metrics.md#weights-and-biases).",
}
_FIT = {
  "data.bad": _TRAIN["prompts.bad"],
  "data.batch_size": "Examples a step, over all devices.",
  "data.duplicates": "`drop`: do not train on a prompt or text that is held out.",
  "data.held_out": "How many examples to hold out, from the end.",
  "data.held_out_path": "Files of examples to hold out instead.",
  "data.max_response_tokens": "The width of a response.",
  "data.max_tokens": "The width of a text's windows, or of a prompt.",
  "data.overflow": "Longer prompts and responses: `drop` the example, or `cut` it.",
  "data.path": _TRAIN["prompts.path"],
  "data.task": "What the files hold ([data](data.md#supervised-data)).",
  "evaluation.batches": "The most held-out batches to evaluate on.",
  "export": "A `.safetensors` file for the best weights.",
  "export_dtype": "The type of that file.",
  "gpm.blocks": "Loss `gpm`: half the length of a response's vector. More blocks fit more cycles.",
  "gpm.prompt_scale": "Loss `gpm`: the prompt weights the blocks.",
  "loss": (
    "`sft`: next token. `judge`: pairwise cross-entropy. `reward`: Bradley-Terry."
    " `gpm`: general preference model ([judges](judges.md#a-general-preference-model))."
  ),
  "template": "The pairwise judge's question, as `judge.template`.",
}
_JUDGES = {"judges.NAME": "The judges, each under a name of your choice."}
MEANINGS = {
  "train": _TRAIN,
  "fit": _FIT,
  "arena": _JUDGES
  | {
    "base": "The policy that KL, length and distinct bigrams are compared with.",
    "max_prompts": "The most held-out prompts to use.",
    "model.weights": "Not read: each policy names its own weights.",
    "policies.NAME.best_of": "The policy's response is the best of so many, by `select_judge`.",
    "policies.NAME.outputs": "Instead of weights: a file of another model's answers.",
    "policies.NAME.realign": (
      "λ of other policies, by name: the logits are `weights` + Σ λ·(policy − `weights`)"
      " ([realignment](arena.md#realignment))."
    ),
    "policies.NAME.weights": "A file or a run: `runs/x`, `runs/x@params:50`, `runs/x@params:best`.",
    "prompts.batch_size": "Prompts at a time.",
    "resamples": "Resamples of the bootstrap.",
    "samples": "Responses of each policy to a prompt; at least 2 for a single policy.",
    "select_judge": "The judge that picks the best of n.",
    "texts": "Prompts shown in `arena.md` with every policy's response.",
  },
  "collect": {
    "budget": "How many labels to buy, for pairs that `design` chooses ([designs](design.md)).",
    "design": (
      "Which pairs are judged: random ones (`uniform`), or `odpo`, `greedy` or `active`"
      " ([designs](design.md))."
    ),
    "features.dimension": "Models with more features are projected to so many, at random.",
    "features.max_tokens": "As `judge.max_tokens`, of the features `gemma`.",
    "features.model": "The model whose states they are; only its files and its dtype are read.",
    "features.name": (
      "The states that a design reads: of a reward model (`bradley_terry`) or a pairwise judge"
      " (`gemma`)."
    ),
    "features.template": "The question, of the features `gemma`.",
    "judge.votes": (
      "Judge `human`, with a `budget`: a workdir of `nash-jax vote` ([designs](design.md#people))."
    ),
    "labels": "`soft`: a label is P. `sampled`: 1 with probability P, else 0.",
    "sampling.samples": "Responses to a prompt; all pairs of them are judged, or a `budget`.",
    "sources.NAME.temperature": "The temperature of its responses.",
    "sources.NAME.weights": "The policies that respond in turn: a file or a run.",
    "steps": "Batches of prompts.",
  },
  "compare": {
    "arena": "The arena of all runs and the reference; none if it has no judges.",
    "base": "What all runs share.",
    "kinds": "Kinds of policy: `network`, and `tabular` if `evaluation.exact`.",
    "learning_rates": "Rates to try, of which each run takes the best; `()` for the base's.",
    "runs": "What each run changes ([jobs](jobs.md#comparisons)).",
    "seeds": "Seeds of each run.",
    "tuning_metric": "What the best rate has least of: distance in the game with β (`regularised`:"
    " SubOpt_β, on texts the win rate − β·KL), or in that without β (`gap`: `exact/gap`).",
    "tuning_seed": "The seed with which learning rates are tried.",
    "tuning_steps": "Steps of each try.",
  },
  "sample": {
    "file": "Prompts: a text file with one a line, or a file of records.",
    "output": "A file for the continuations, as JSON lines; `''` prints them.",
    "prompt": "The prompt; `''` asks for prompts until an empty line.",
    "realign": "λ: logits are (1 - λ)·reference + λ·policy.",
    "reference": "The reference, read if λ is not 1.",
    "sampling.samples": "Continuations of a prompt.",
  },
  "agreement": _JUDGES
  | {
    "data.held_out": "Compare on the last so many examples; 0 for all.",
    "model.weights": "Not read: only the tokenizer and the template are.",
    "responses": "Responses to a prompt among which to look for cycles.",
  },
  "vote": {
    "by": "One file of votes for `all`, or one for each `annotator` or `group`.",
    "export": "A `.jsonl` file for the votes; then no page is served.",
    "host": "The address to serve; one other than this machine's own needs a token.",
    "model.weights": "Not read: only the tokenizer and the template are.",
    "port": "The port to serve.",
    "seed": "Decides the sides and the order in which responses are shown.",
    "shared": "The share of the pairs that everybody judges.",
    "source": "Files or folders to take pairs from, separated by commas.",
    "votes": "Votes that each pair gets, from as many people.",
  },
  "model.changes": {
    "num_layers": "Layers.",
    "num_embed": "Rows of the vocabulary.",
    "embed_dim": "Width of the model.",
    "hidden_dim": "Width of the MLP.",
    "num_heads": "Heads of queries.",
    "num_kv_heads": "Heads of keys and values.",
    "head_dim": "Width of a head.",
    "sliding_window_size": "Window of local layers.",
    "final_logit_softcap": "Soft-cap of the logits.",
    "attn_logits_soft_cap": "Soft-cap of attention.",
    "local_base_frequency": "Base frequency of rope in local layers.",
    "global_base_frequency": "The same in global layers.",
    "local_scale_factor": "Scale of positions in local layers.",
    "global_scale_factor": "The same in global layers.",
    "query_pre_attn_scalar": "Queries are divided by its root.",
    "use_qk_norm": "Normalise queries and keys.",
    "transpose_gating_einsum": "Layout of the gating weights in published checkpoints.",
    "value_norm": "The blocks are Gemma 4's, which normalise values too.",
    "global_key_size": "Width of a head in global layers.",
    "num_global_kv_heads": "Heads of keys and values in global layers.",
    "k_eq_v_global": "Values of global layers are their keys, normalised.",
    "global_rope_proportion": "Share of a global layer's head that rope turns.",
    "per_layer_input_dim": "Columns of each layer's own embedding.",
    "num_kv_shared_layers": "Last layers that read keys and values of the last ones before them.",
    "override_kv_shared_ffw_hidden": "Width of the MLP in those layers.",
  },
}


def meaning(job: str, field: str) -> str:
  """Returns what a field of a job means.

  Raises:
    KeyError: the field has no meaning here.
  """
  for table in (MEANINGS[job], _TRAIN, _FIT):
    for name in (field, field.removeprefix("judge.")):
      if name in table:
        return table[name]
  raise KeyError(f"{job}: {field} has no meaning in config/meanings.py")
