"""The kernels that a compiled program's text names, how often they run, and what they cost."""

from __future__ import annotations

import pytest

from pi0_jax.flops import Device
from pi0_jax.plan import hlo
from pi0_jax.plan.kernels import LAUNCH_SECONDS, kernels, largest, total

GPU = Device(memory=1e9, flops=1e12, bandwidth=1e9, link=1e9)
TPU = GPU._replace(clock=1e9)

TEXT = """
HloModule jit_f, is_scheduled=true

FileNames
1 "/home/me/pi0_jax/model/layers.py"
2 "/home/me/pi0_jax/model/gemma.py"

FunctionNames
1 "dot"

FileLocations
1 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=1 function_name_id=1 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%product (a: bf16[8,16], w: bf16[3,16,32], i: s32[]) -> f32[8,32] {
  %a = bf16[8,16]{1,0} parameter(0)
  %w = bf16[3,16,32]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %one = bf16[1,16,32]{2,1,0} dynamic-slice(%w, %i, %zero, %zero), dynamic_slice_sizes={1,16,32}
  %m = bf16[16,32]{1,0} bitcast(%one)
  ROOT %dot = f32[8,32]{1,0} dot(%a, %m), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%in_place (x: f32[100,8], new: f32[1,8], i: s32[]) -> f32[100,8] {
  %x = f32[100,8]{1,0} parameter(0)
  %new = f32[1,8]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %0 = s32[] constant(0)
  ROOT %updated = f32[100,8]{1,0} dynamic-update-slice(%x, %new, %at, %0)
}

%body (p: (s32[], bf16[8,16], bf16[3,16,32], f32[100,8], f32[1,8])) -> (s32[], bf16[8,16], bf16[3,16,32], f32[100,8], f32[1,8]) {
  %p = (s32[], bf16[8,16]{1,0}, bf16[3,16,32]{2,1,0}, f32[100,8]{1,0}, /*index=4*/f32[1,8]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %x.1 = bf16[8,16]{1,0} get-tuple-element(%p), index=1
  %w.1 = bf16[3,16,32]{2,1,0} get-tuple-element(%p), index=2
  %kept = f32[100,8]{1,0} get-tuple-element(%p), index=3
  %row = f32[1,8]{1,0} get-tuple-element(%p), index=4
  %fusion.1 = f32[8,32]{1,0} fusion(%x.1, %w.1, %n), kind=kCustom, calls=%product, metadata={op_name="jit(f)/dot" stack_frame_id=2}
  %fusion.2 = f32[100,8]{1,0} fusion(%kept, %row, %n), kind=kLoop, calls=%in_place
  ROOT %t = (s32[], bf16[8,16]{1,0}, bf16[3,16,32]{2,1,0}, f32[100,8]{1,0}, f32[1,8]{1,0}) tuple(%n, %x.1, %w.1, %fusion.2, %row)
}

%condition (p: (s32[])) -> pred[] {
  %q = (s32[]) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: (s32[]), b: bf16[8,16]) -> bf16[8,16] {
  %a = (s32[]) parameter(0)
  %b = bf16[8,16]{1,0} parameter(1)
  %loop = (s32[]) while(%a), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %gemm = (f32[8,8]{1,0}, s8[64]{0}) custom-call(%b, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  ROOT %copy = bf16[8,16]{0,1} copy(%b)
}
"""  # noqa: E501


def test_kernels_are_counted_with_the_rounds_of_their_loop():
    found = kernels(hlo.parse(TEXT), GPU)
    assert [(k.kind, k.times) for k in found] == [("product", 10), ("fusion", 10), ("product", 1), ("copy", 1)]
    assert total(found, GPU).kernels == 22
    assert total(found, GPU).launch_seconds == 22 * LAUNCH_SECONDS


def test_work_and_bytes_of_each_kernel():
    sliced, in_place, gemm, copy = kernels(hlo.parse(TEXT), GPU)
    assert sliced.flops == 2 * 8 * 16 * 32
    assert sliced.bytes == 2 * 8 * 16 + 2 * 16 * 32 + 4 * 8 * 32 + 4  # one layer of the stack, and the index
    assert in_place.bytes == 4 * 8 + 4 * 8 + 4  # the new row alone is read and written
    assert gemm.flops == 2 * 8 * 8 * 16
    assert copy.bytes == 2 * 2 * 8 * 16
    assert copy.seconds == copy.bytes / GPU.bandwidth
    slow = GPU._replace(flops=1e3)
    assert kernels(hlo.parse(TEXT), slow)[0].seconds == sliced.flops / slow.flops


def test_the_largest_costs_name_the_lines_of_code():
    found = largest(kernels(hlo.parse(TEXT), GPU))
    assert found[0].place == "model/layers.py:9 < model/gemma.py:7"
    assert found[0].kernels == 10
    assert found[0].bytes > found[1].bytes


def test_a_loop_without_a_known_number_of_rounds_takes_one_that_is_given():
    program = hlo.parse(TEXT.replace("known_trip_count", "something_else"))
    with pytest.raises(ValueError, match="rounds are not known: loop"):
        kernels(program, GPU)
    assert kernels(program, GPU, unknown_rounds=4)[0].times == 4


def test_a_loop_that_may_end_early_has_as_many_rounds_as_its_counter():
    held = "%held (n: s32[]) -> pred[] {\n  ROOT %most = s32[] constant(9)\n}\n\n%condition"
    text = TEXT.replace("known_trip_count", "something_else").replace("%condition", held, 1)
    program = hlo.parse(text.replace("pred[] constant(true)", "pred[] fusion(%q), kind=kLoop, calls=%held"))
    assert [kernels(program, GPU, unknown_rounds=early)[0].times for early in (None, 4, 20)] == [9, 4, 9]


COUNTED = """
%condition (p: (s32[], f32[18,64,64])) -> pred[] {
  %bound = s32[]{:T(128)} constant(18)
  %p = (s32[]{:T(128)}, f32[18,64,64]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}
"""
"""Of a scan over 18 layers, as libtpu prints it."""
DECODES = """
%fused (flag: pred[1], i: s32[]) -> pred[] {
  %i = s32[] parameter(1)
  %bound = s32[] constant(251)
  %less = pred[] compare(%i, %bound), direction=LT
  %flag = pred[1]{0} parameter(0)
  %open = pred[1]{0} not(%flag)
  %flat = pred[] bitcast(%open)
  ROOT %and = pred[] and(%less, %flat)
}

%condition (p: (s32[], pred[1])) -> pred[] {
  %p = (s32[], pred[1]{0}) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %done = pred[1]{0} get-tuple-element(%p), index=1
  ROOT %fusion = pred[] fusion(%done, %n), kind=kLoop, calls=%fused
}
"""
"""Of decoding up to 251 tokens, as XLA prints it for GPUs."""


@pytest.mark.parametrize(("condition", "rounds"), [(COUNTED, (18, 18, 18)), (DECODES, (251, 12, 251))])
def test_a_loop_that_only_counts_is_not_cut_to_the_tokens_that_are_written(condition, rounds):
    program = hlo.parse(
        condition + "ENTRY %main () -> s32[] {\n  %w = s32[] while(%t), condition=%condition, body=%b\n}"
    )
    loop = program.computations["main"]["w"]
    assert tuple(program.rounds(loop, early) for early in (None, 12, 300)) == rounds


TPU_TEXT = """
ENTRY %main (w: bf16[3,256,128], x: bf16[3,8,256]) -> f32[3,8,128] {
  %w = bf16[3,256,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %x = bf16[3,8,256]{2,1,0:T(8,128)(2,1)} parameter(1)
  %start = (bf16[3,256,128]{2,1,0:T(8,128)(2,1)S(1)}, bf16[3,256,128]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w)
  %done = bf16[3,256,128]{2,1,0:T(8,128)(2,1)S(1)} copy-done(%start)
  ROOT %c = f32[3,8,128]{2,1,0:T(8,128)S(1)} convolution(%x, %done), window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf, backend_config={"window_config":{"estimated_cycles":"2000"}}
}
"""  # noqa: E501


def test_a_tpus_kernels_have_cycles_and_what_is_on_the_chip_is_not_in_main_memory():
    copy, product = kernels(hlo.parse(TPU_TEXT), TPU)
    assert (copy.kind, copy.bytes) == ("copy", 2 * 3 * 256 * 128)
    assert product.bytes == 2 * 3 * 8 * 256
    assert product.flops == 2 * 3 * 8 * 256 * 128  # a batch of three, though its window meets nine pairs
    assert product.seconds == 2000 / TPU.clock
    cost = total([copy, product], TPU)
    assert cost.cycles == 2000
    assert cost.total_seconds == cost.memory_seconds == (copy.bytes + product.bytes) / TPU.bandwidth


FUSED = """HloModule jit_f, is_scheduled=true

%cast_layer (w: f32[10,16,32]) -> bf16[16,32] {
  %w = f32[10,16,32]{2,1,0} parameter(0)
  %narrow = bf16[10,16,32]{2,1,0} convert(%w)
  %one = bf16[1,16,32]{2,1,0} slice(%narrow), slice={[3:4], [0:16], [0:32]}
  ROOT %m = bf16[16,32]{1,0} bitcast(%one)
}

%cast (w: f32[16,32]) -> bf16[16,32] {
  %w.1 = f32[16,32]{1,0} parameter(0)
  ROOT %narrow.1 = bf16[16,32]{1,0} convert(%w.1)
}

%add_rows (table: f32[1000,8], rows: s32[4,1], new: f32[4,8]) -> f32[1000,8] {
  %table = f32[1000,8]{1,0} parameter(0)
  %rows = s32[4,1]{1,0} parameter(1)
  %new = f32[4,8]{1,0} parameter(2)
  ROOT %sum = f32[1000,8]{1,0} scatter(%table, %rows, %new), to_apply=%add
}

ENTRY %main (w: f32[10,16,32], m: f32[16,32], table: f32[1000,8], rows: s32[4,1], new: f32[4,8]) -> f32[1000,8] {
  %w.2 = f32[10,16,32]{2,1,0} parameter(0)
  %m.2 = f32[16,32]{1,0} parameter(1)
  %table.2 = f32[1000,8]{1,0} parameter(2)
  %rows.2 = s32[4,1]{1,0} parameter(3)
  %new.2 = f32[4,8]{1,0} parameter(4)
  %fusion.1 = bf16[16,32]{1,0} fusion(%w.2), kind=kLoop, calls=%cast_layer
  %fusion.2 = bf16[16,32]{1,0} fusion(%m.2), kind=kLoop, calls=%cast
  ROOT %fusion.3 = f32[1000,8]{1,0} fusion(%table.2, %rows.2, %new.2), kind=kInput, calls=%add_rows
}
"""


def test_bytes_of_slices_of_what_is_cast_and_of_scatters():
    cast_layer, cast, scatter = kernels(hlo.parse(FUSED), GPU)
    assert cast_layer.bytes == (4 + 2) * 16 * 32  # of one layer, though the cast is written before the slice
    assert cast.bytes == (4 + 2) * 16 * 32
    assert scatter.bytes == 3 * 4 * 4 * 8 + 4 * 4  # four rows are read, added to and written, at four places
