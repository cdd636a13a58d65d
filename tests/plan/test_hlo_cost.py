"""Costs of compiled programs: every iteration of a loop counts, and calls of libraries do."""

import jax
import pytest
from jax import numpy as jnp

from nash_jax.plan import hlo_cost


def text_of(fn, *shapes):
  return (
    jax.jit(fn).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile().as_text()
  )


def test_a_loop_costs_as_much_as_its_iterations():
  def turns(count):
    def body(x, w):
      return jnp.tanh(x @ w), None

    return lambda x, ws: jax.lax.scan(body, x, ws[:count])[0]

  shapes = ((64, 128), (12, 128, 128))
  one = hlo_cost.analyse(text_of(turns(4), *shapes))
  three = hlo_cost.analyse(text_of(turns(12), *shapes))
  products = 2 * 64 * 128 * 128
  assert 4 * products <= one.flops < 4.5 * products
  assert 12 * products <= three.flops < 13.5 * products
  assert one.bytes > 4 * 128 * 128 * 4


def test_loops_within_loops_and_loops_that_may_end_early():
  def fn(x, w):
    def inner(carry):
      t, y = carry
      return t + 1, jnp.tanh(y @ w)

    def outer(y, _):
      return jax.lax.while_loop(lambda c: (c[0] < 5) & (jnp.sum(c[1]) < 1e9), inner, (0, y))[1], ()

    return jax.lax.scan(outer, x, None, length=7)[0]

  flops = hlo_cost.analyse(text_of(fn, (32, 64), (64, 64))).flops
  products = 35 * 2 * 32 * 64 * 64
  assert products <= flops < 1.2 * products


def test_a_loop_without_a_bound_is_named():
  def fn(x):
    return jax.lax.while_loop(lambda y: jnp.sum(y) > y[0, 0], lambda y: y * 0.5, x)

  with pytest.raises(ValueError, match="has no constant bound"):
    hlo_cost.analyse(text_of(fn, (4, 4)))


def test_a_jaxlib_without_the_private_analysis_is_named(monkeypatch):
  monkeypatch.delattr("jaxlib._jax.hlo_module_cost_analysis")
  with pytest.raises(RuntimeError, match=r"lacks _hlo.* jaxlib 0\.11 and 0\.12 have both"):
    hlo_cost.analyse(text_of(jnp.tanh, (4, 4)))


def test_steps_of_two_are_half_as_many_iterations():
  condition = ["  %n = s32[] get-tuple-element(%p), index=1", "  %b = s32[] constant(16)"]
  body = [
    "  %k = s32[] constant(2)",
    "  %next = s32[] add(%old, %k)",
    "  ROOT %t = (f32[2]{0}, s32[]) tuple(%x, %next)",
  ]
  assert hlo_cost._trips("while(...)", condition, body) == 8
  assert hlo_cost._trips('"known_trip_count":{"n":"3"}', condition, body) == 3


def test_a_transfer_moves_what_it_fetches_from_main_memory_and_writes_back():
  fetched, context = "f32[8,128]{1,0:S(1)}", "s32[]{:S(2)}"
  text = f"""HloModule transfers

ENTRY %main (p: f32[208,128]) -> f32[8,128] {{
  %p = f32[208,128]{{1,0}} parameter(0)
  %s = ((f32[208,128]{{1,0}}), {fetched}, {context}) slice-start(%p), slice={{[8:16], [0:128]}}
  %t = {fetched} slice-done(%s)
  %u = {fetched} negate(%t)
  %v = (f32[8,128]{{1,0}}, {fetched}, {context}) copy-start(%u)
  ROOT %w = f32[8,128]{{1,0}} copy-done(%v)
}}
"""
  assert hlo_cost.analyse(text) == (8 * 128, 2 * 8 * 128 * 4)


# A product as XLA's compiler for GPUs leaves it: a call of cuBLAS, in a loop of three rounds.
CUBLAS = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], bf16[64,32], bf16[32,16])) -> (s32[], bf16[64,32], bf16[32,16]) {
  %p = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = bf16[64,32]{1,0} get-tuple-element(%p), index=1
  %w = bf16[32,16]{1,0} get-tuple-element(%p), index=2
  %product = (bf16[64,16]{1,0}, s8[4096]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_batch_dimensions":[],"lhs_contracting_dimensions":["1"],"rhs_batch_dimensions":[],"rhs_contracting_dimensions":["0"]},"epilogue":"DEFAULT"}}
  ROOT %out = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}) tuple(%next, %x, %w)
}

%condition (c: (s32[], bf16[64,32], bf16[32,16])) -> pred[] {
  %c = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%j, %three), direction=LT
}

ENTRY %main (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,32] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}) tuple(%zero, %a, %b)
  %loop = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %end = bf16[64,32]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_a_product_that_a_gpu_leaves_to_its_library_is_counted():
  cost = hlo_cost.analyse(CUBLAS)
  products, moved = 3 * 2 * 64 * 32 * 16, 3 * 2 * (64 * 32 + 32 * 16 + 64 * 16)
  assert products <= cost.flops <= products + 3 * 10  # and the counter's own steps
  assert moved <= cost.bytes <= moved + 3 * 100


GATHER = """HloModule jit_f, is_scheduled=true

%fused (table: f32[1000,8], ids: s32[4,1], x: f32[4,8]) -> f32[4,8] {
  %table = f32[1000,8]{1,0} parameter(0)
  %ids = s32[4,1]{1,0} parameter(1)
  %x = f32[4,8]{1,0} parameter(2)
  %rows = f32[4,8]{1,0} gather(%table, %ids), offset_dims={1}, collapsed_slice_dims={0}, start_index_map={0}, index_vector_dim=1, slice_sizes={1,8}
  ROOT %sum = f32[4,8]{1,0} add(%rows, %x)
}

ENTRY %main (a: f32[1000,8], b: s32[4,1], c: f32[4,8]) -> f32[4,8] {
  %a = f32[1000,8]{1,0} parameter(0)
  %b = s32[4,1]{1,0} parameter(1)
  %c = f32[4,8]{1,0} parameter(2)
  ROOT %out = f32[4,8]{1,0} fusion(%a, %b, %c), kind=kLoop, calls=%fused
}
"""  # noqa: E501


def test_a_fusion_that_gathers_of_a_table_reads_the_rows_alone():
  rows, ids = 4 * 8 * 4, 4 * 4
  assert hlo_cost.analyse(GATHER).bytes == 3 * rows + ids  # gathered, added, written
  twice = "  %all = f32[1000,8]{1,0} negate(%table)\n  ROOT %sum"
  used = GATHER.replace("  ROOT %sum", twice)
  assert hlo_cost.analyse(used).bytes >= 1000 * 8 * 4  # what else reads it reads all
