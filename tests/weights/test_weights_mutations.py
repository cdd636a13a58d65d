"""Files of weights, mutated in every way that files are: loaded as they say, or refused in a line.

Mutations are of valid files: cut, a mark or NUL inserted, a byte turned, a part doubled; in JSON, a
type swapped, a key dropped, a number replaced.
"""

import contextlib
import copy
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import numpy as jnp
from paths import FIXTURES
from weight_files import MODELS, NAMES, checkpoint, hugging_face_model, random, same

from nash_jax import policy, weights
from nash_jax.models import gemma, lora
from nash_jax.run.checkpoint import Checkpoints
from nash_jax.weights import hf_config

TINY = gemma.preset("tiny")
MARKS = (b"\xef\xbb\xbf", b"\0", b"\xff", b"\n", b"\r\n", b"{", b"}", b"\xe2\x80\xa8", b"NaN", b"-")
VALUES = (None, True, False, -1, 0, 3, 1.5, 1e30, float("nan"), float("inf"), 10**400, "", "x")
VALUES += ("../x", "/etc/passwd", "a\nb", "\ud83d", "\0", [], {}, [[]], [1], {"a": None})


# Each property is tried a few times, and often in the slow tests.
OFTEN = pytest.mark.parametrize("often", [1, pytest.param(40, marks=pytest.mark.slow)])


def every(examples, strategy, check):
  """Runs a check on that many examples."""
  run = settings(max_examples=examples, suppress_health_check=list(HealthCheck))
  run(given(strategy)(check))()


@st.composite
def mutated(draw, raw: bytes) -> bytes:
  """Bytes of a file with one to three changes."""
  for _ in range(draw(st.integers(1, 3))):
    # Half of them near the beginning, where headers are.
    at = draw(st.one_of(st.integers(0, len(raw)), st.integers(0, min(200, len(raw)))))
    how = draw(st.sampled_from(["cut", "insert", "turn", "double", "drop", "bytes"]))
    if how == "cut":
      raw = raw[:at]
    elif how == "insert":
      raw = raw[:at] + draw(st.sampled_from(MARKS)) + raw[at:]
    elif how == "turn" and at < len(raw):
      raw = raw[:at] + bytes([raw[at] ^ (1 << draw(st.integers(0, 7)))]) + raw[at + 1 :]
    elif how == "double":
      raw = raw[:at] + raw[max(0, at - 16) :]
    elif how == "drop":
      raw = raw[:at] + raw[at + draw(st.integers(1, 16)) :]
    elif how == "bytes":
      raw = raw[:at] + draw(st.binary(max_size=12)) + raw[at:]
  return raw


@st.composite
def changed(draw, tree):
  """JSON with a value swapped for another, or a key dropped or renamed."""
  tree = json.loads(json.dumps(tree))
  for _ in range(draw(st.integers(1, 2))):
    parents, todo = [], [tree]
    while todo:
      node = todo.pop()
      if isinstance(node, dict | list) and node:
        parents.append(node)
        todo += node.values() if isinstance(node, dict) else node
    if not parents:
      return tree
    node = draw(st.sampled_from(parents))
    key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
    how = draw(st.sampled_from(["swap", "swap", "swap", "drop", "rename", "whole"]))
    if how == "whole" and draw(st.integers(0, 9)) == 0:
      return draw(st.sampled_from(VALUES))
    if how == "drop":
      node.pop(key)
    elif how == "rename" and isinstance(node, dict):
      node[key + draw(st.sampled_from(["x", " ", "\0"]))] = node.pop(key)
    else:
      node[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
  return tree


def load(path, config, read=weights.load):
  """Returns finite parameters, or None where they were refused as they should be."""
  try:
    params = read(str(path), config)
  except ValueError as error:
    message = str(error)
    assert "\n" not in message
    assert str(path) in message, message
    return None
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
  return params


def split(raw: bytes) -> tuple[dict, bytes]:
  """Returns (header, data) of a .safetensors file."""
  stop = 8 + int.from_bytes(raw[:8], "little")
  return json.loads(raw[8:stop]), raw[stop:]


def joined(header, data: bytes) -> bytes:
  text = json.dumps(header).encode("utf-8", "surrogatepass")
  return len(text).to_bytes(8, "little") + text + data


@pytest.fixture(scope="module")
def own(tmp_path_factory):
  """The bytes of a file of ours with a card and a head, and where to write mutations of it."""
  path = tmp_path_factory.mktemp("own") / "w.safetensors"
  params = {**random(TINY), "head": {"w": np.arange(16, dtype=np.float32)}}
  weights.save(str(path), params, TINY, "float16", {"step": 3, "figures": {"eval/loss": 2.5}})
  return path.read_bytes(), path


def check_own(path):
  """Compares what is loaded with what the safetensors library reads."""
  params = load(path, TINY)
  if params is not None:
    got = gemma.unstack({name: x for name, x in params.items() if name != "head"}, TINY)
    expected = safetensors.numpy.load(path.read_bytes())
    if "head/w" in expected:
      got["head"] = params["head"]
    got = {jax.tree_util.keystr(k, simple=True, separator="/"): x for k, x in _leaves(got)}
    same(got, {name: x.astype(np.float32) for name, x in expected.items()})


def _leaves(tree):
  return jax.tree.leaves_with_path(tree)


@OFTEN
def test_a_mutated_file_is_loaded_as_it_says_or_refused(own, often):
  raw, path = own

  def check(found):
    path.write_bytes(found)
    check_own(path)

  every(12 * often, mutated(raw), check)
  every(5 * often, st.binary(max_size=300), check)


@OFTEN
def test_a_mutated_header_and_card_is_loaded_as_it_says_or_refused(own, often):
  raw, path = own
  header, tensors = split(raw)

  def check(found):
    path.write_bytes(joined(found, tensors))
    check_own(path)

  every(12 * often, changed(header), check)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
  """A copy of the sharded fixture."""
  folder = tmp_path_factory.mktemp("sharded") / "model"
  shutil.copytree(FIXTURES / "hf_gemma3", folder)
  return folder, MODELS["hf_gemma3"], hugging_face_model("hf_gemma3")[2]


@contextlib.contextmanager
def replaced(path: pathlib.Path, raw: bytes):
  before = path.read_bytes()
  path.write_bytes(raw)
  try:
    yield
  finally:
    path.write_bytes(before)


def dumped(tree):
  return json.dumps(tree).encode()


@OFTEN
def test_a_mutated_index_is_read_as_before_or_refused(sharded, often):
  folder, config, expected = sharded
  path = folder / hf_config.INDEX
  raw = path.read_bytes()

  def check(found):
    with replaced(path, found):
      params = load(folder, config)
    if params is not None:
      same(params, expected)

  every(8 * often, changed(json.loads(raw)).map(dumped) | mutated(raw) | st.binary(), check)


@OFTEN
def test_a_mutated_shard_is_read_or_refused(sharded, often):
  folder, config, expected = sharded
  path = folder / "model-00002-of-00003.safetensors"
  raw = path.read_bytes()
  header, tensors = split(raw)

  def check(found):
    with replaced(path, found):
      params = load(folder, config)
    if params is not None:
      assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)

  every(6 * often, changed(header).map(lambda x: joined(x, tensors)) | mutated(raw), check)


FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "head_dim", "query_pre_attn_scalar")
FIELDS += ("layer_types", "sliding_window", "final_logit_softcapping", "attn_logit_softcapping")
FIELDS += ("num_key_value_heads", "hidden_activation", "rms_norm_eps", "tie_word_embeddings")


@OFTEN
@pytest.mark.parametrize("name", NAMES)
def test_a_mutated_config_says_the_same_or_is_refused(tmp_path, name, often):
  raw, path = (FIXTURES / name / "config.json").read_bytes(), tmp_path / "config.json"
  original = json.loads(raw)

  def check(found):
    path.write_bytes(found)
    if load(tmp_path, MODELS[name], checked) is not None:
      got = json.loads(found.decode("utf-8-sig"))
      got = got.get("text_config") or got
      assert {field: got[field] for field in FIELDS if field in got}.items() <= original.items()

  every(60 * often, changed(original).map(dumped) | mutated(raw) | st.binary(), check)


def checked(path, config):
  """Reads a config alone, where `load` reads weights."""
  hf_config.check_config(path, config)
  return {}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
  """The workdir of a run of adapters, and its policy."""
  folder = tmp_path_factory.mktemp("adapted")
  base, rng = random(TINY), np.random.default_rng(0)
  weights.save(str(folder / "base.safetensors"), base, TINY, "float32", {})
  adapters = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32),
    lora.init(jax.random.key(0), base, 2),
  )
  model = {"weights": str(folder / "base.safetensors"), "dtype": "float32"}
  config = {"model": {**model, "lora": {"rank": 2, "alpha": 4.0}}, "seed": 0}
  checkpoints = Checkpoints(folder / "run", keep=1, config=config)
  checkpoints.save(1, {"params": adapters})
  checkpoints.close()
  return folder / "run", policy.load_weights(str(folder / "run"), TINY)


@OFTEN
def test_adapters_of_a_mutated_config_are_those_of_the_run_or_refused(adapted, often):
  workdir, expected = adapted
  path = workdir / "config.json"
  original = json.loads(path.read_text())

  def check(tree):
    with replaced(path, dumped(tree)):
      params = load(workdir, TINY, policy.load_weights)
    if params is not None and isinstance(tree, dict) and tree.get("model") == original["model"]:
      same(params, expected)

  every(4 * often, changed(original), check)


@pytest.mark.slow
def test_a_damaged_orbax_checkpoint_is_read_or_refused(tmp_path):
  """Every file of it cut in turn, emptied, deleted, filled with NUL, or one byte turned."""
  params = random(TINY)
  path = pathlib.Path(checkpoint(tmp_path / "c", params, TINY, "nested"))
  rng = np.random.default_rng(0)
  for file in sorted(path.rglob("*")):
    if not file.is_file():
      continue
    raw = file.read_bytes()
    turned = bytearray(raw)
    if turned:
      turned[rng.integers(len(turned))] ^= 0xFF
    for damaged in (raw[: len(raw) // 2], b"", None, bytes(len(raw)), bytes(turned)):
      file.unlink() if damaged is None else file.write_bytes(damaged)
      load(path, TINY)
      file.write_bytes(raw)
  same(weights.load(str(path), TINY), params)
