"""What a compiled program computes and moves, every loop counted as often as it turns."""

import functools
import math
import re
from typing import NamedTuple

import jax
from jaxlib import _hlo, _jax

_HEAD = re.compile(r"^(?:ENTRY )?(%\S+) \(")
_WHILE = re.compile(r" while\(.*?condition=(%[^\s,]+), body=(%[^\s,]+)")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations=\{)=?(%[^\s,})]+)")
_BOUND = re.compile(r"= [su]\d+\[\]\S* constant\((\d+)\)")
_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# An instruction: name, shape, operation, operands; and an array within a shape.
_LINE = re.compile(r"^\s*(?:ROOT )?(%\S+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*?)\)")
_ARRAY = re.compile(r"\b(pred|[a-z]+[0-9]+)\[([0-9,]*)\]\{[^}]*S\(1\)[^}]*\}")
# What only names arrays, and so moves nothing; of a custom call XLA's analysis knows nothing.
_NAMES = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "custom-call")
# A transfer beside the computation: its shape is a tuple of source, destination and context.
_START = re.compile(r"^(\s*(?:ROOT )?%\S+ = )(\(.*\)) (copy|slice)-start\(", re.MULTILINE)
_SHAPE = re.compile(r"\b(?:pred|[a-z]+[0-9]+)\[[0-9,]*\](?:\{[^}]*\})?")


class Cost(NamedTuple):
  """Floating point operations, and bytes of main memory read or written, on one device."""

  flops: float
  bytes: float

  def plus(self, other: "Cost", times: float = 1.0) -> "Cost":
    return Cost(self.flops + times * other.flops, self.bytes + times * other.bytes)


def analyse(text: str) -> Cost:
  """Returns the cost of an optimised HLO module's text, as `compiled.as_text()` gives it.

  XLA's own analysis of a module counts the body of a loop once. Here every computation that a loop
  runs is given to it as a module of its own, and counts as often as the loop's condition allows:
  a loop that may end early, as decoding does, counts as if it did not. What a TPU holds in its
  vector memory, S(1) in the text, is no traffic of the main memory.

  Raises:
    ValueError: a loop whose bound is not a constant.
  """
  text = _in_line(text)
  parts, entry = _computations(text)

  def reached(name):
    """The lines of a computation and of those it calls, which its analysis includes."""
    lines = list(parts[name])
    for line in parts[name]:
      if " while(" not in line:
        for called in _CALLED.findall(line):
          lines += reached(called)
    return lines

  @functools.cache
  def once(name):
    module = _hlo.hlo_module_from_text(_with_entry(text, name))
    found = _jax.hlo_module_cost_analysis(jax.local_devices(backend="cpu")[0].client, module)
    moved = found.get("bytes accessed", 0.0) - _on_chip(parts[name])
    return Cost(found.get("flops", 0.0), max(0.0, moved))

  @functools.cache
  def total(name):
    cost = once(name)
    for line in reached(name):
      for condition, body in _WHILE.findall(line):
        trips = _trips(line, reached(condition), parts[body])
        cost = cost.plus(once(body), -1).plus(total(body), trips)
    return cost

  return total(entry)


def _in_line(text: str) -> str:
  """Returns the text with transfers beside the computation as plain copies and slices.

  XLA's analysis counts all arrays in a transfer's shape, the whole that it takes a slice of too.
  """

  def plain(found):
    name, shape, kind = found.groups()
    arrays = _SHAPE.findall(shape)  # (destination, source, context); ((source), slice, context)
    return f"{name}{arrays[kind == 'slice']} {kind}("

  return re.sub(r" (?:copy|slice)-done\(", " bitcast(", _START.sub(plain, text))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Returns each computation's lines by its name, and the name of the entry."""
  parts, entry, name = {}, None, None
  for line in text.splitlines():
    if found := _HEAD.match(line):
      name = found[1]
      parts[name], entry = [], name if line.startswith("ENTRY") else entry
    elif name:
      parts[name].append(line)
  return parts, entry


def _with_entry(text: str, name: str) -> str:
  _, _, rest = text.partition("\n")
  rest = re.sub(r"^ENTRY ", "", rest, flags=re.MULTILINE)
  rest = re.sub(rf"^{re.escape(name)} \(", f"ENTRY {name} (", rest, flags=re.MULTILINE)
  return f"HloModule part\n{rest}"  # without the header's claims, which hold for the whole alone


def _on_chip(lines: list[str]) -> int:
  """Returns how many bytes of vector memory the instructions of a computation read and write."""
  total, held = 0, {}
  for name, shape, operation, operands in filter(None, map(_parts_of, lines)):
    held[name] = sum(_bytes(kind, sizes) for kind, sizes in _ARRAY.findall(shape))
    if operation not in _NAMES and not operation.endswith("-done"):
      total += held[name] + sum(held.get(x, 0) for x in re.findall(r"%[^\s,)]+", operands))
  return total


def _parts_of(line: str):
  found = _LINE.match(line)
  return found and found.groups()


def _bytes(kind: str, sizes: str) -> int:
  bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
  return math.prod(int(n) for n in sizes.split(",") if n) * bits // 8


def _trips(line: str, condition: list[str], body: list[str]) -> int:
  """Returns how often a loop turns: a counter from 0 to the condition's bound, in body's steps."""
  if stated := _COUNT.search(line):
    return int(stated[1])
  known = {
    m[1]: int(_BOUND.search(text)[1])
    for text in condition
    if _BOUND.search(text) and (m := re.match(r"\s*(?:ROOT )?(%\S+) = ", text))
  }
  compared = [
    known[name]
    for text in condition
    if "direction=LT" in text
    for name in re.findall(r"%[^\s,)]+", text)
    if name in known
  ]
  bounds = compared or list(known.values())
  if not bounds:
    raise ValueError("a loop of the compiled program has no constant bound: " + line.strip()[:200])
  return -(-max(bounds) // _step(condition, body))


def _step(condition: list[str], body: list[str]) -> int:
  """Returns what a turn adds to the counter, 1 where the body does not say it plainly."""
  place = [int(n) for text in condition for n in re.findall(r"\), index=(\d+)", text)]
  lines = {found[1]: text for text in body if (found := re.match(r"\s*(?:ROOT )?(%\S+) = ", text))}
  root = next((text for text in body if text.lstrip().startswith("ROOT")), "")
  results = re.findall(r"%[^\s,)]+", root.partition(" tuple(")[2].partition(")")[0])
  if len(place) != 1 or len(results) <= place[0]:
    return 1
  added = lines.get(results[place[0]], "").partition(" add(")[2].partition(")")[0]
  steps = [
    int(n) for name in re.findall(r"%[^\s,]+", added) for n in _BOUND.findall(lines.get(name, ""))
  ]
  return steps[0] if len(steps) == 1 else 1
