"""A user's own judges: functions that a config names ("my_module:make"), or functions of texts."""

import dataclasses
import importlib
import inspect
import logging
import pathlib
import pkgutil
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh

from nash_jax.data import judge_template
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.judges.base import Comparison, Judge, pairwise
from nash_jax.models import sharding
from nash_jax.run import metrics
from nash_jax.types import Answers, Mean, Params, Prompts, Responses, Verdict
from nash_jax.validation import did_you_mean, require

log = logging.getLogger(__name__)
FORM = "module:function"  # form of such a judge's name
_KINDS = "arrays of numbers, or pytrees of them"


def is_own(name: str) -> bool:
  """Returns whether a judge's name in a config names a user's function."""
  return ":" in name


def find(name: str, what: str = "judge.name") -> Callable[..., Judge]:
  """Imports the function that makes a judge, from the working directory or sys.path.

  Raises:
    ValueError: no such module or function, an error in it, a wrong signature; on one line.
  """
  module, _, attribute = name.partition(":")
  good = all(part.isidentifier() for part in (*module.split("."), attribute))
  fix = "Leave .py out." if module.endswith(".py") else "Folders are named with dots: folder.file."
  good = good and not module.endswith(".py")
  require(good, what, f"{FORM}, such as my_judge:make", name, fix)
  found = _import(module, name, what)
  function, path = getattr(found, attribute, None), getattr(found, "__file__", module)
  if not callable(function):
    close = did_you_mean(attribute, [n for n, x in vars(found).items() if callable(x)])
    got = "nothing of that name" if function is None else f"{type(function).__name__}"
    raise ValueError(f"{what}: expected a function {attribute} in {path}, got {got}{close}")
  try:
    inspect.signature(function).bind("config", "tokenizer", **_options(function, None))
  except (TypeError, ValueError) as error:  # ValueError: a C function without a signature
    raise ValueError(
      f"{what}: expected a function that can be called as {attribute}(config, tokenizer), or with"
      f" a third argument mesh, got {name}: {error}"
    ) from error
  return function


def file(name: str) -> str:
  """Returns the path of the module in a judge's name; "" if the module has no file."""
  find(name)
  return getattr(sys.modules[name.partition(":")[0]], "__file__", None) or ""


def _import(module: str, name: str, what: str) -> ModuleType:
  folder, first = pathlib.Path.cwd(), module.partition(".")[0]
  here = (folder / f"{first}.py").is_file() or (folder / first).is_dir()
  if here and str(folder) not in sys.path:
    sys.path.insert(0, str(folder))  # stays, since the module may import its neighbours later
  importlib.invalidate_caches()  # the file may be new
  try:
    return pkgutil.resolve_name(module)
  except (Exception, SystemExit) as error:  # a user's file may raise anything
    missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
    if not missing:
      raise ValueError(f"{what}: {module} cannot be imported: {_in_a_line(error)}") from error
    raise ValueError(
      f"{what}: expected a module in the working directory, {folder}, or on sys.path, got {name!r}:"
      f" {error}. Start the job where the file is, or set PYTHONPATH to its folder."
    ) from None


def _options(function: Callable, mesh: Mesh | None) -> dict[str, Any]:
  return {"mesh": mesh} if "mesh" in inspect.signature(function).parameters else {}


def _in_a_line(error: BaseException) -> str:
  """Returns an error on one line, with its place in the user's files."""
  package = str(pathlib.Path(__file__).parents[1])
  places = [
    f"{frame.filename}:{frame.lineno}"
    for frame in traceback.extract_tb(error.__traceback__)
    if not frame.filename.startswith((package, "<")) and "site-packages" not in frame.filename
  ]
  place = f" ({places[-1]})" if places else ""
  return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"


def make(config, tokenizer: Tokenizer, mesh: Mesh | None = None, rewards: bool = False) -> Judge:
  """Calls the function that `config.name` names, and checks the shapes of what it returns.

  Parameters that are not yet laid out on the mesh are replicated on every device.

  Args:
    rewards: whether verdicts must have scalar rewards.

  Raises:
    ValueError: the function fails, or returns no judge; on one line.
  """
  function, name = find(config.name), config.name
  try:
    judge = function(config, tokenizer, **_options(function, mesh))
  except Exception as error:
    raise ValueError(f"judge.name: {name} raised {_in_a_line(error)}") from error
  what, fix = f"judge.name: what {name} returns", "Return judges.Judge(params, fn)."
  require(isinstance(judge, Judge), what, "a nash_jax.judges.Judge", type(judge).__name__, fix)
  require(callable(judge.fn), f"{what}: fn", "a function", type(judge.fn).__name__, fix)
  try:
    params = jax.tree.map(jnp.asarray, judge.params)
  except TypeError as error:
    raise ValueError(f"{what}: params: expected {_KINDS}: {error}") from error
  judge = dataclasses.replace(judge, params=params)
  types = {str(x.dtype) for x in jax.tree.leaves(params) if not _is_number(x)}
  require(not types, f"{what}: params", _KINDS, sorted(types), "Convert them.")
  for opponents in (0, 3):
    _check_verdict(judge, what, opponents, rewards)
  return judge if mesh is None else dataclasses.replace(judge, params=_laid_out(params, mesh))


def _is_number(x: jax.Array) -> bool:
  return any(jnp.issubdtype(x.dtype, kind) for kind in (np.number, np.bool_))


def _laid_out(params: Params, mesh: Mesh) -> Params:
  everywhere = sharding.replicated(mesh)

  def place(x, target):
    if x.sharding == target:
      return x
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, everywhere, lambda index: x[index])

  return jax.tree.map(place, params, shardings(params, mesh))


def shardings(params: Params, mesh: Any) -> Any:
  """Returns each parameter's sharding on this mesh; replicated if it has none."""

  def layout(x):
    found = getattr(x, "sharding", None)
    on_mesh = isinstance(found, jax.sharding.NamedSharding) and found.mesh == mesh
    return found if on_mesh else sharding.replicated(mesh)

  return jax.tree.map(layout, params)


def _check_verdict(judge: Judge, what: str, opponents: int, rewards: bool) -> None:
  """Checks the shapes of a verdict on two responses to two prompts, with or without opponents."""

  def empty(samples: int) -> tuple[Prompts, Responses]:
    rows, width = 2, 8
    tokens = jnp.zeros((rows, samples, width), jnp.int32)
    stopped = jnp.zeros((rows, samples), bool)
    responses = Responses(tokens, tokens > 0, 1.0 * tokens, 1.0 * tokens, stopped)
    return Prompts(tokens[:, 0], tokens[:, 0] > 0, tokens[:, 0, 0]), responses

  prompts, responses = jax.eval_shape(lambda: empty(2))
  others = jax.eval_shape(lambda: empty(opponents))[1] if opponents else None
  call = f"{what}: fn(params, prompts, responses, {'opponents' if opponents else 'None'})"
  try:
    verdict = jax.eval_shape(judge.fn, judge.params, prompts, responses, others)
  except Exception as error:
    raise ValueError(f"{call} raised {_in_a_line(error)}") from error
  fix, pairs = "Build fn by judges.pairwise.", (2, 2, opponents or 2)
  require(isinstance(verdict, Verdict), call, "a Verdict", type(verdict).__name__, fix)
  expected: dict[str, tuple[Any, tuple[int, ...]]] = {
    "p_win": (jnp.floating, pairs), "valid": (np.bool_, pairs), "rewards": (jnp.floating, pairs[:2])
  }  # fmt: skip
  if not rewards and verdict.rewards is None:
    del expected["rewards"]
  for field, (kind, size) in expected.items():
    x = getattr(verdict, field)
    good = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, kind) and x.shape == size
    got = f"{x.dtype}{[*x.shape]}" if hasattr(x, "dtype") else x
    advice = "Give rewards by judges.pairwise(judges.compare_rewards, reward, scalar=True)."
    form = f"{'bool' if field == 'valid' else 'float'}{[*size]}"
    require(good, f"{call}: {field}", form, got, advice if field == "rewards" else fix)
  unknown = sorted(name for name in verdict.metrics if not metrics.is_known(name))
  names = f"names that begin with {metrics.OWN!r}, or of docs/metrics.md"
  require(not unknown, f"{what}: metrics", names, unknown, "Rename them.")
  means = all(isinstance(mean, Mean) for mean in verdict.metrics.values())
  require(means, f"{what}: metrics", "a types.Mean each", verdict.metrics, "Use Mean.from_values.")


def from_texts(
  prefer: Callable[[str, str, str], float], tokenizer: Tokenizer, mesh: Mesh | None = None
) -> Judge:
  """Builds a judge from a Python function of texts, prefer(prompt, a, b) -> P(a ≻ b).

  The function is called on the host for both orders of a pair, and P is the mean. `flip_rate`
  counts pairs whose orders have different winners. If the function raises, or returns no number in
  [0, 1], the pair is invalid; the first such case is logged. The judge has no parameters.

  Args:
    mesh: the argument of `make`; each host then judges its own rows.

  Raises:
    ValueError: the function does not take three texts.
  """
  try:
    inspect.signature(prefer).bind("prompt", "a", "b")
  except TypeError as error:
    raise ValueError(f"from_texts: expected a function of (prompt, a, b): {error}") from error
  hidden, thought = judge_template.hidden_ids(tokenizer)
  warned: list[str] = []

  def text(ids: np.ndarray, mask: np.ndarray) -> str:
    shown = judge_template.without_thoughts(thought, ids, mask)
    return tokenizer.decode(i for i in ids[shown].tolist() if i not in hidden)

  def ask(prompt: str, a: str, b: str) -> float:
    try:
      if 0 <= (p := float(prefer(prompt, a, b))) <= 1:
        return p
      problem = f"expected a number in [0, 1], got {p}"
    except Exception as error:
      problem = _in_a_line(error)
    if not warned:
      warned.append(problem)
      log.warning(
        "pairs for which %s fails have no verdict; the first failure: %s", prefer.__name__, problem
      )
    return np.nan

  def host(*arrays: Any) -> np.ndarray:
    columns = map(np.asarray, arrays)
    texts = (map(text, ids, mask) for ids, mask in zip(columns, columns, strict=True))
    rows = [(ask(x, a, b), ask(x, b, a)) for x, a, b in zip(*texts, strict=True)]
    return np.array(rows, np.float32).reshape(-1, 2)

  def call_host(*arrays: Any) -> jax.Array:
    result = jax.ShapeDtypeStruct((len(arrays[0]), 2), jnp.float32)
    return jax.pure_callback(host, result, *arrays, vmap_method="sequential")

  # A plain callback would gather all rows on one device, where later operations would stay.
  if mesh is not None:
    spec = sharding.batch_sharding(mesh).spec
    call_host = jax.shard_map(call_host, mesh=mesh, in_specs=spec, out_specs=spec)

  def compare(params: Params, prompts: Prompts, a: Answers, b: Answers) -> Comparison:
    asked = call_host(prompts.tokens, prompts.mask, a.tokens, a.mask, b.tokens, b.mask)
    first, second = asked[:, 0], asked[:, 1]
    valid = jnp.isfinite(first) & jnp.isfinite(second)
    flipped = Mean.from_values((first > 0.5) != (second < 0.5), valid)
    return Comparison((first + 1 - second) / 2, valid, {"flip_rate": flipped}, first)

  return Judge({}, pairwise(compare))
