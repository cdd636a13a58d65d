"""A policy from a run's config: tokenizer, architecture, weights, log-probabilities, samplers."""

import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool
from ml_collections import ConfigDict

from nash_jax import keys, sampler, weights
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.models import gemma, logprobs, lora, sharding
from nash_jax.models.gemma import GemmaConfig
from nash_jax.run import checkpoint, files
from nash_jax.types import Logprobs, Params
from nash_jax.validation import asset_path, one_of, require
from nash_jax.weights import adapters

_DTYPES = ("float32", "bfloat16", "float16")  # of a run's base in memory


class Policy(NamedTuple):
  """How to sample responses and evaluate their log-probabilities, for any parameters.

  Attributes:
    make_sampler: (samples=, mixture=, behaviour_temperature=) -> sampler.Sample.
  """

  logprobs: Logprobs
  make_sampler: Callable[..., sampler.Sample]


def tokenizer_and_model(model) -> tuple[Tokenizer, GemmaConfig]:
  """Returns the tokenizer and the architecture of the `model` part of a config.

  Raises:
    ValueError: an unknown tokenizer or preset; a tokenizer with more pieces than the model's rows.
  """
  tokenizer = Tokenizer(asset_path(model.tokenizer), model.template)
  model_config = gemma.preset(model.preset, **model.changes)
  tokenizer.check_rows(model_config.num_embed)
  return tokenizer, model_config


def config_of_run(saved: dict[str, Any]) -> dict[str, Any]:
  """Returns a run's config as jobs take it from its JSON, with attention types for their names."""
  changes = dict(saved["model"].get("changes") or {})
  if "attention_types" in changes:
    kinds = {kind.name: kind for kind in (gemma.LOCAL, gemma.GLOBAL)}
    changes["attention_types"] = tuple(kinds.get(x, x) for x in changes["attention_types"])
  return {**saved, "model": {**saved["model"], "changes": changes}}


def make_policy(model, sampling, tokenizer: Tokenizer, model_config: GemmaConfig) -> Policy:
  """Returns the policy of a config's `model` and `sampling` parts."""
  shared = {
    "model_config": model_config,
    "forbidden": forbidden(sampling, tokenizer, model_config),
    "temperature": sampling.temperature,
    "dtype": jnp.dtype(model.dtype),
  }
  return Policy(
    functools.partial(
      logprobs.response_logprobs, remat=model.remat, chunk=model.logit_chunk, **shared
    ),
    functools.partial(
      sampler.make_sampler, max_tokens=sampling.max_tokens, stop_ids=tokenizer.stop_ids,
      pad_id=tokenizer.pad_id, top_k=sampling.top_k, top_p=sampling.top_p, **shared,
    ),
  )  # fmt: skip


def forbidden(sampling, tokenizer: Tokenizer, model_config: GemmaConfig) -> Bool[Array, "V"]:
  """Returns a mask of the ids that no policy may sample."""
  forbidden = tokenizer.forbidden(model_config.num_embed, sampling.markers)
  allowed = np.asarray(sampling.tokens, int)
  if not len(allowed):
    return jnp.asarray(forbidden)
  expected = f"ids below the tokenizer's {tokenizer.size} pieces, without padding and markers"
  unknown = allowed[~np.isin(allowed, np.flatnonzero(~forbidden))].tolist()
  fix = "Leave it empty to allow every piece; sampling.markers allows markers."
  require(not unknown, "sampling.tokens", expected, unknown, fix)
  return jnp.asarray(~np.isin(np.arange(model_config.num_embed), allowed))


class WeightsSource(NamedTuple):
  """Where weights are read from.

  Attributes:
    path: a file, a folder, or a run's workdir.
    field: "params" or "target" of a run; "" if the spec names neither.
    step: digits, or "best"; "" for the newest checkpoint.
  """

  path: str
  field: str = ""
  step: str = ""


def parse_weights(spec: str, what: str = "weights") -> WeightsSource:
  """Returns where a spec of `load_weights` points.

  A path that exists is taken as it is, even if it contains "@".

  Args:
    what: the name of the spec in errors.

  Raises:
    ValueError: an unknown field or step after "@", or no run before it.
  """
  whole = asset_path(spec)
  path, _, part = whole.rpartition("@")
  if os.path.exists(whole) or not os.path.exists(path):
    return WeightsSource(whole)
  field, _, step = part.partition(":")
  one_of(f"{what}, after @", field or "params", ("params", "target"))
  valid = step in ("", "best") or (step.isascii() and step.isdigit())
  fix = "Leave it out for the newest checkpoint."
  require(valid, f"{what}, after :", "a step or best", step, fix)
  run = os.path.isdir(path) and not weights.kind(path)
  require(run, what, "a run's workdir before @", spec, "Leave out @ and what follows.")
  return WeightsSource(path, field or "params", step)


def _is_run(path: str) -> bool:
  return os.path.isdir(path) and not weights.kind(path) and not adapters.is_folder(path)


def check_saved(spec: str, what: str = "weights") -> None:
  """Raises ValueError if a spec of `load_weights` is a run without that checkpoint; reads none."""
  source = parse_weights(spec, what)
  if _is_run(source.path):
    try:
      checkpoint.check_saved(source.path, *_step_and_best(source))
    except ValueError as error:
      raise ValueError(f"{what} {spec!r}: {error}") from error


def check_vocabulary(specs: Iterable[str], tokenizer: Tokenizer, model_config: GemmaConfig) -> None:
  """Raises ValueError unless models can be mixed token by token; reads no tensor.

  A run says what its tokenizer was. Of other weights only names and shapes are known.
  """
  with open(tokenizer.path, "rb") as file:
    digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
  fix = "Models that are mixed token by token share one vocabulary."
  for spec in specs:
    path = parse_weights(spec).path
    if adapters.is_folder(path):
      check_vocabulary([adapters.base_of(path)], tokenizer, model_config)
    elif not os.path.isdir(path) or weights.kind(path):
      weights.reader(path, model_config)
    else:
      inputs = files.read_json(pathlib.Path(path) / "inputs.json").get("model.tokenizer", {})
      same, expected = not inputs or digest in inputs.values(), f"a run with {tokenizer.path!r}"
      require(same, f"weights {spec}: model.tokenizer", expected, [*inputs], fix)
      saved = checkpoint.read_config(path)
      model = config_of_run(saved)["model"] if saved else {}
      rows = gemma.preset(model["preset"], **model["changes"]).num_embed if model else None
      same, expected = rows in (None, model_config.num_embed), f"{model_config.num_embed} rows"
      require(same, f"weights {spec}: vocabulary", expected, rows, fix)


def read_start(model, model_config: GemmaConfig, head: bool = False) -> Callable[[Params], Params]:
  """Returns base -> base joined with the adapters of `model.lora.init`, for `lora.init`.

  The adapters are read immediately. Without any, the function returns the base itself.

  Args:
    model: the `model` part of a config.
    head: whether a reward model is trained, whose adapters may include a head.

  Raises:
    ValueError: the folder is not PEFT's, or its adapters are of another model or a larger rank.
  """
  rank = model.lora.rank
  if not (rank and model.lora.init):
    return lambda base: base
  scale = model.lora.alpha / rank
  start = adapters.read(asset_path(model.lora.init), model_config, rank, scale)
  fix = "Set loss=reward to start a reward model from them."
  expected = "adapters of a language model"
  require(head or "head" not in start, "model.lora.init", expected, "a reward model's", fix)
  return lambda base: lora.join(base, start, 1.0)


def load_adapters(
  spec: str, model_config: GemmaConfig, head: Params | None = None
) -> tuple[Params, float, int]:
  """Returns a LoRA run's adapters, their alpha, and their step, without reading the base.

  Args:
    head: shapes of the head that the run trained with them, if it trained one.
  """
  source = parse_weights(spec)
  adapted = _read_lora(source.path)
  fix = "A run without adapters is exported as a whole model."
  require(adapted is not None, "run", "one with model.lora.rank > 0", spec, fix)
  assert adapted
  base = gemma.shapes(model_config)
  if head:
    base |= {"head": head}
  shapes = jax.eval_shape(lora.init_and_join(adapted)[0], base)
  trained, step = _restore(source, shapes)
  return trained, adapted.model.lora.alpha, step


def _restore(source: WeightsSource, shapes: Params) -> tuple[Params, int]:
  """Returns a field of a run's state, and its step."""
  field = source.field or "params"
  return checkpoint.restore_part(source.path, field, shapes, *_step_and_best(source))


def _step_and_best(source: WeightsSource) -> tuple[int | None, bool]:
  return int(source.step) if source.step.isdigit() else None, source.step == "best"


def load_weights(spec: str, model_config: GemmaConfig, *args: Any, **options: Any) -> Params:
  """Returns the parameters of `load_weights_and_step`; takes the same arguments."""
  return load_weights_and_step(spec, model_config, *args, **options)[0]


def load_weights_and_step(
  spec: str,
  model_config: GemmaConfig,
  seed: int = 0,
  dtype: DTypeLike = jnp.float32,
  mesh: Mesh | None = None,
  *,
  head: bool = False,
) -> tuple[Params, int | None]:
  """Returns parameters from a file or run, and the step if they are a run's.

  Args:
    spec: "" for random parameters; what weights.load takes; "assets:..."; a folder of PEFT
      adapters; or a run's workdir: "runs/x" (newest params), "runs/x@target", "runs/x@params:50",
      "runs/x@params:best". Adapters are merged into their base.
    mesh: the mesh to lay the parameters out on; by default the first device.
    head: keep the head of a reward model's file.

  Raises:
    ValueError: weights that do not exist or have another shape (names the first difference);
      adapters whose base has changed.
  """
  shardings = None if mesh is None else sharding.shardings(gemma.shapes(model_config), mesh)

  def init(key: Array) -> Params:
    return gemma.cast(gemma.init(key, model_config), dtype)

  if not spec:
    return jax.jit(init, out_shardings=shardings)(keys.key(seed, "init")), None
  source = parse_weights(spec)
  path = source.path
  if adapters.is_folder(path):
    return _load_adapted(path, model_config, seed, dtype, mesh, shardings), None
  if _is_run(path):
    return _load_from_run(source, model_config, dtype, mesh, shardings)
  params = weights.load(path, model_config, dtype, shardings)
  return params if head else {n: leaf for n, leaf in params.items() if n != "head"}, None


def _load_adapted(path: str, model_config: GemmaConfig, seed, dtype, mesh, shardings) -> Params:
  """Returns a folder of PEFT adapters merged into its base, which must be on this machine."""
  start, base = adapters.read(path, model_config), adapters.base_of(path)
  what = f"{os.path.join(path, adapters.CONFIG)}: base_model_name_or_path"
  fix = "Write the path of the base's weights there."
  present = os.path.exists(parse_weights(base, what).path)
  require(present, what, "a path that exists", base, fix)
  same = os.path.realpath(base) == os.path.realpath(path)
  require(not same, what, "another folder", base, fix)
  params = load_weights(base, model_config, seed, mesh=mesh)

  def merge(base: Params) -> Params:
    merged = lora.merge(lora.join(base, start, 1.0))
    return gemma.cast({name: x for name, x in merged.items() if name != "head"}, dtype)

  return jax.jit(merge, out_shardings=shardings)(params)


def _load_from_run(
  source: WeightsSource, model_config: GemmaConfig, dtype, mesh, shardings
) -> tuple[Params, int]:
  path = source.path
  shapes, adapted = gemma.shapes(model_config), _read_lora(path)
  if adapted:
    init, join = lora.init_and_join(adapted)
    shapes = jax.eval_shape(init, shapes)
    try:
      base = load_weights(adapted.model.weights, model_config, adapted.seed, mesh=mesh)
    except ValueError as error:
      raise ValueError(f"run {path}: its adapters need model.weights: {error}") from error
    checkpoint.verify_base(path, gemma.cast(base, adapted.model.dtype))
  if mesh is not None:
    shapes = sharding.abstract(shapes, sharding.shardings(shapes, mesh))
  trained, number = _restore(source, shapes)

  def merge(base: Params, trained: Params) -> Params:
    return gemma.cast(lora.merge(join(base, trained)), dtype)

  if adapted:
    trained = jax.jit(merge, out_shardings=shardings)(base, trained)
  weights.check_finite(f"weights {path}", trained, dtype)
  return gemma.cast(trained, dtype), number


def _read_lora(workdir: str) -> ConfigDict | None:
  """Returns the parts of a run's config on its adapters and their base; None without adapters."""
  config = checkpoint.read_config(workdir)
  if not config:
    return None
  try:
    model = config["model"]
    lora_fields = model.get("lora") or {"rank": 0}
    rank, alpha = int(lora_fields["rank"]), float(lora_fields.get("alpha", 0.0))
    if not rank:
      return None
    base = {"weights": model["weights"], "dtype": model["dtype"]}
    if not (0 < rank < 2**31 and base["dtype"] in _DTYPES and base["weights"].isprintable()):
      raise ValueError(f"rank {rank}, {base}")
    if not 0 <= int(config["seed"]) < 2**63:
      raise ValueError(f"seed {config['seed']}")
    found = {"model": {**base, "lora": {"rank": rank, "alpha": alpha}}, "seed": int(config["seed"])}
  except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
    raise ValueError(
      f"{os.path.join(workdir, 'config.json')}: expected a run's config with seed, model.lora,"
      f" model.weights and model.dtype, got {error!r:.80}: restore the file"
    ) from error
  return ConfigDict(found)
