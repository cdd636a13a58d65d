"""FLOPs and bytes of a compiled program, with each loop counted as often as it runs."""

import collections
import functools
import math
import re
from typing import NamedTuple

import jax
import jaxlib

_HEAD = re.compile(r"^(?:ENTRY )?(%\S+) \(")
_WHILE = re.compile(r" while\(.*?condition=(%[^\s,]+), body=(%[^\s,]+)")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations=\{)=?(%[^\s,})]+)")
_CONSTANT = re.compile(r"\s*(?:ROOT )?(%\S+) = [su]\d+\[\]\S* constant\((\d+)\)")
_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_RESULT = re.compile(r"\s*(?:ROOT )?(%\S+) = ")
_OPERAND = re.compile(r"%[^\s,)]+")
# An instruction (name, shape, operation, operands), and an array within a shape.
_LINE = re.compile(r"^\s*(?:ROOT )?(%\S+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*?)\)")
_ARRAY = re.compile(r"\b(pred|[a-z]+[0-9]+)\[([0-9,]*)\]\{[^}]*S\(1\)[^}]*\}")
# Operations that only name arrays and move nothing; XLA's analysis ignores custom calls.
_NAMES = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "custom-call")
# An asynchronous transfer: its shape is a tuple of source, destination and context.
_START = re.compile(r"^(\s*(?:ROOT )?%\S+ = )(\(.*\)) (copy|slice)-start\(", re.MULTILINE)
# On a GPU a matrix product is a call of cuBLAS, with the summed axes.
_CUBLAS = re.compile(
  r' custom-call\(.*custom_call_target="__cublas.*"lhs_contracting_dimensions":\[([^]]*)\]'
)
_SHAPE = re.compile(r"\b(?:pred|[a-z]+[0-9]+)\[[0-9,]*\](?:\{[^}]*\})?")


class Cost(NamedTuple):
  """Floating point operations, and bytes of main memory read or written, on one device."""

  flops: float
  bytes: float

  def plus(self, other: "Cost", times: float = 1.0) -> "Cost":
    return Cost(self.flops + times * other.flops, self.bytes + times * other.bytes)


def analyse(text: str) -> Cost:
  """Returns the cost of an optimised HLO module, from the text of `compiled.as_text()`.

  XLA's own analysis counts the body of a loop once. Here it analyses each computation that a loop
  runs as a separate module, counted as often as the loop can run at most: a loop that may end
  early, such as decoding, counts in full. Arrays in a TPU's vector memory, S(1) in the text, are
  not traffic of the main memory.

  Raises:
    ValueError: the bound of a loop is not a constant.
  """
  text = _synchronous(text)
  computations, entry = _computations(text)
  defined = {m[1]: m[2] for m in map(_LINE.match, text.splitlines()) if m}

  def reached(name: str) -> list[str]:
    """Returns the lines of a computation and of all it calls, which its analysis includes."""
    lines = list(computations[name])
    for line in computations[name]:
      if " while(" not in line:
        for called in _CALLED.findall(line):
          lines += reached(called)
    return lines

  @functools.cache
  def once(name: str) -> Cost:
    properties = _xla_analysis(_with_entry(text, name))
    lines = computations[name]
    moved = properties.get("bytes accessed", 0.0) - _on_chip(lines)
    fusions = [called for line in lines if " fusion(" in line for called in _CALLED.findall(line)]
    moved -= sum(_not_gathered(computations[fusion]) for fusion in fusions)
    return Cost(properties.get("flops", 0.0), max(0.0, moved))

  @functools.cache
  def total(name: str) -> Cost:
    cost = once(name).plus(_cublas(reached(name), defined))
    for line in reached(name):
      for condition, body in _WHILE.findall(line):
        trips = _trips(line, reached(condition), computations[body])
        cost = cost.plus(once(body), -1).plus(total(body), trips)
    return cost

  return total(entry)


def _xla_analysis(text: str) -> dict[str, float]:
  """Returns XLA's analysis of a module, which is private; tested with jaxlib 0.11 and 0.12."""
  try:
    from jaxlib import _hlo, _jax

    parse, analysis = _hlo.hlo_module_from_text, _jax.hlo_module_cost_analysis
  except (ImportError, AttributeError) as error:
    names = "_hlo.hlo_module_from_text and _jax.hlo_module_cost_analysis"
    lacks = f"jaxlib {jaxlib.__version__} lacks {names}"
    raise RuntimeError(f"{lacks}, jaxlib 0.11 and 0.12 have both") from error
  return analysis(jax.local_devices(backend="cpu")[0].client, parse(text))


def _synchronous(text: str) -> str:
  """Returns the text with plain copies and slices in place of asynchronous transfers.

  XLA's analysis counts all arrays in a transfer's shape, even the whole array that is sliced.
  """

  def plain(match):
    name, shape, operation = match.groups()
    arrays = _SHAPE.findall(shape)  # (destination, source, context); ((source), slice, context)
    return f"{name}{arrays[operation == 'slice']} {operation}("

  return re.sub(r" (?:copy|slice)-done\(", " bitcast(", _START.sub(plain, text))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Returns {computation: lines}, and the name of the entry computation."""
  computations: dict[str, list[str]] = {}
  entry = name = ""
  for line in text.splitlines():
    if match := _HEAD.match(line):
      name = match[1]
      computations[name], entry = [], name if line.startswith("ENTRY") else entry
    elif name:
      computations[name].append(line)
  return computations, entry


def _with_entry(text: str, name: str) -> str:
  _, _, rest = text.partition("\n")
  rest = re.sub(r"^ENTRY ", "", rest, flags=re.MULTILINE)
  rest = re.sub(rf"^{re.escape(name)} \(", f"ENTRY {name} (", rest, flags=re.MULTILINE)
  return f"HloModule part\n{rest}"  # without the header's fields, which describe the full module


def _on_chip(lines: list[str]) -> int:
  """Returns the bytes of vector memory that a computation's instructions read and write."""
  total, held = 0, {}
  for match in filter(None, map(_LINE.match, lines)):
    name, shape, operation, operands = match.groups()
    held[name] = sum(_bytes(dtype, sizes) for dtype, sizes in _ARRAY.findall(shape))
    if operation not in _NAMES and not operation.endswith("-done"):
      total += held[name] + sum(held.get(x, 0) for x in _OPERAND.findall(operands))
  return total


def _not_gathered(fusion: list[str]) -> int:
  """Returns the bytes of inputs that a fusion does not read, since it only gathers from them.

  XLA's analysis counts such an input in full, such as the whole table for a token's embedding.
  """
  matches = [match for match in map(_LINE.match, fusion) if match]
  uses = collections.Counter(x for match in matches for x in _OPERAND.findall(match[4]))
  inputs = {m[1]: _bytes(*_first_array(m[2])) for m in matches if m[3] == "parameter"}
  unread = 0
  for _, shape, operation, operands in (match.groups() for match in matches):
    table = next(iter(_OPERAND.findall(operands)), "")
    if operation == "gather" and uses[table] == 1 and table in inputs:
      unread += max(0, inputs[table] - _bytes(*_first_array(shape)))
  return unread


def _cublas(lines: list[str], defined: dict[str, str]) -> Cost:
  """Returns the cost of calls of cuBLAS, which XLA's analysis ignores.

  Args:
    defined: {instruction of the module: shape}.
  """
  cost = Cost(0.0, 0.0)
  for line in lines:
    match, call = _LINE.match(line), _CUBLAS.search(line)
    if match and call:
      # The first array of the result; the rest is cuBLAS's workspace.
      names = _OPERAND.findall(match[4])
      (dtype, sizes), *operands = map(_first_array, (match[2], *(defined[name] for name in names)))
      left = operands[0][1].split(",")
      summed = math.prod(int(left[int(axis)]) for axis in re.findall(r"\d+", call[1]))
      flops = 2.0 * math.prod(map(int, sizes.split(","))) * summed
      moved = _bytes(dtype, sizes) + sum(_bytes(*operand) for operand in operands)
      cost = cost.plus(Cost(flops, moved))
  return cost


def _first_array(shape: str) -> tuple[str, str]:
  """Returns type and sizes of a shape's first array, such as ("bf16", "8,128")."""
  match = re.search(r"\b(pred|[a-z]+[0-9]+)\[([0-9,]*)\]", shape)
  return (match[1], match[2]) if match else ("u8", "0")


def _bytes(dtype: str, sizes: str) -> int:
  bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
  return math.prod(int(n) for n in sizes.split(",") if n) * bits // 8


def _trips(line: str, condition: list[str], body: list[str]) -> int:
  """Returns how often a loop runs whose counter goes from 0 to a bound in steps of its body."""
  if stated := _COUNT.search(line):
    return int(stated[1])
  comparison = " ".join(text for text in condition if "direction=LT" in text)
  bounds = _constants(condition, comparison) or _constants(condition, " ".join(condition))
  if not bounds:
    raise ValueError("a loop of the compiled program has no constant bound: " + line.strip()[:200])
  return -(-max(bounds) // _step(condition, body))


def _constants(lines: list[str], names: str) -> list[int]:
  values = {match[1]: int(match[2]) for match in map(_CONSTANT.match, lines) if match}
  return [values[name] for name in _OPERAND.findall(names) if name in values]


def _step(condition: list[str], body: list[str]) -> int:
  """Returns what the body adds to the counter; 1 if the text does not show it."""
  place = [int(n) for text in condition for n in re.findall(r"\), index=(\d+)", text)]
  lines = {match[1]: text for text in body if (match := _RESULT.match(text))}
  root = next((text for text in body if text.lstrip().startswith("ROOT")), "")
  results = _OPERAND.findall(root.partition(" tuple(")[2].partition(")")[0])
  if len(place) != 1 or len(results) <= place[0]:
    return 1
  added = lines.get(results[place[0]], "").partition(" add(")[2].partition(")")[0]
  steps = _constants(body, added)
  return steps[0] if len(steps) == 1 else 1
