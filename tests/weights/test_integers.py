# SPDX-License-Identifier: BSD-3-Clause
"""Weights of 8 and 4 bits: the contents of the formats, and the kernels against the reference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import switchgear
from backends_in_use import QUANTIZED_ISAS, SIMT_DEVICES, backend_named, kernels_of
from errors import raises
from switchgear import ops, reference, testing
from switchgear.reference import integers as rq
from switchgear.reference.formats import BITS
from switchgear.testing import CASES, U32, Bounded, Case, GluOptions, Layer, assert_close, exact, make_layer
from switchgear.weights import Form, Int4, Int8, Weight

C = testing.C
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (
    Int8(),
    Int8(group_size=64, symmetric=False),
    Int4(),
    Int4(group_size=16, symmetric=False),
    Int4(group_size=128),
)


@pytest.fixture(params=QUANTIZED_ISAS)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels_of(request.param):
        yield request.param


@pytest.fixture(params=["reference", *QUANTIZED_ISAS, *SIMT_DEVICES])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with backend_named(request.param):
        yield request.param


def quantized(weight: Tensor, format: Form, parts: int = 1) -> Weight:
    stored = format.encode("weight", weight, parts)
    assert isinstance(stored, Weight)
    return stored


def levels_of(weight: Weight) -> rq.Levels:
    assert weight.scales is not None
    assert weight.row_scales is not None
    blocks = rq.Quantized(weight.data, weight.scales, weight.row_scales, weight.zeros)
    return rq.from_blocks(blocks, weight.rows, weight.cols, BITS[weight.format], weight.parts)


def call(
    x: Tensor, weight: Weight, bias: Tensor | None, offsets: Tensor, indices: Tensor | None, flip: bool = False
) -> Tensor:
    return ops.grouped_gemm(x, weight.tensors, weight.form, bias, offsets, indices, flip, False)


def forward(x: Tensor, weights: tuple[Weight, Weight], *rest: Any) -> tuple[Tensor, Tensor]:
    """ops.moe_forward; rest: biases, topk_ids, topk_weights, options, save_h."""
    first, second = weights
    return ops.moe_forward(x, first.tensors, first.form, second.tensors, second.form, *rest)


# ---- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(2, 40, 96), (3, 17, 37), (1, 1, 1)], ids=str)
def test_levels_are_the_nearest(format: Form, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    size, bits = format.group_size, BITS[format.name]
    levels = rq.quantize(weight, bits, size, format.symmetric)
    plain, q = rq.dequantize(levels, bits, size), levels.q
    step = (
        (levels.scales.float() * levels.row_scales[..., None])
        .abs()
        .repeat_interleave(size or shape[2], -1)[..., : shape[2]]
    )
    low, high = (rq.dequantize(levels._replace(q=torch.full_like(q, end)), bits, size) for end in (0, 2**bits - 1))
    inside = (weight >= torch.minimum(low, high)) & (weight <= torch.maximum(low, high))
    assert bool(((plain - weight).abs() <= step * 0.5001 + 1e-7)[inside].all())
    if bits == 8 and format.symmetric:
        assert bool(inside.all())
        assert int(q.min()) >= 1
    relative = float((plain - weight).norm() / weight.norm())
    assert relative < (0.012 if bits == 8 else 0.11)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_experts_are_quantised_each_for_itself(bits: int, symmetric: bool) -> None:
    """In any storage too: small experts go several at a time, rows of large ones in slices."""
    torch.manual_seed(1)
    for shape in ((5, 6, 40), (3, 3000, 48)):
        weight = torch.randn(shape)
        together = rq.quantize(weight, bits, 16, symmetric)
        transposed = rq.quantize(weight.mT.contiguous().mT, bits, 16, symmetric)
        alone = [rq.quantize(expert[None], bits, 16, symmetric) for expert in weight]
        for got, other, parts in zip(together, transposed, zip(*alone, strict=True), strict=True):
            if got is None:
                assert other is parts[0] is None
                continue
            assert torch.equal(got, torch.cat(parts))
            assert torch.equal(got, other)


def test_int4_is_closer_than_the_rounding_of_the_range() -> None:
    """The rule without a search: the extreme of a group maps to -8."""
    weight = torch.randn(1, 256, 512)
    plain = rq.dequantize(rq.quantize(weight, 4, 32, True), 4, 32)
    groups = weight.unflatten(-1, (-1, 32))
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = extreme / -8
    rounded = ((groups / scale).round().clamp(-8, 7) * scale).flatten(-2)
    assert float((plain - weight).norm()) < 0.95 * float((rounded - weight).norm())


def test_special_weights() -> None:
    for format in FORMATS:
        for value in (0.0, 1.5, -0.25):  # constant groups
            weight = torch.full((1, 3, 40), value)
            plain = quantized(weight, format).plain()
            assert torch.allclose(plain, weight, rtol=2**-8, atol=0), (format, value)
        for value in (math.nan, math.inf):
            with raises(ValueError, "weight"):
                quantized(torch.full((1, 3, 40), value), format)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("columns", [1, 8, 37, 200])
def test_storage(format: Form, parts: int, columns: int) -> None:
    """The bytes are where ops.h documents them, and decode to the same values."""
    weight = torch.randn(2, 38, columns)
    bits = BITS[format.name]
    plain = rq.quantize(weight, bits, format.group_size, format.symmetric)
    blocks = rq.to_blocks(plain, bits, parts)
    back = rq.from_blocks(blocks, 38, columns, bits, parts)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(back, plain, strict=True))
    per_part = 38 // parts
    for row, column in ((0, 0), (17, columns - 1), (37, columns // 2)):
        block = row // per_part * -(-per_part // 16) + row % per_part // 16
        at = 4 * (row % per_part % 16) + column % 4
        if bits == 8:
            q = blocks.values[1, block, column // 4, at]
        else:
            byte = blocks.values[1, block, column // 8, at]
            q = byte >> 4 if column % 8 >= 4 else byte & 15
        assert q == plain.q[1, row, column]
        group = column // format.group_size if format.group_size else 0
        assert blocks.scales[1, block, group, row % per_part % 16] == plain.scales[1, row, group]


# ---- grouped_gemm ----------------------------------------------------------------------------------------------------


def product_bound(x: Tensor, matrix: Weight, bias: Tensor | None, offsets: Tensor, indices: Tensor | None) -> Bounded:
    """The integers are exact, so only the float operations count: two per group and per block of activations, the row's
    scale, the bias."""
    weight, bits = levels_of(matrix), BITS[matrix.format]
    size = matrix.group_size or matrix.cols
    block = rq.activation_block(matrix.group_size, matrix.cols)
    values, x_scales = rq.quantize_rows(x, block)
    if indices is not None:
        values, x_scales = reference.gather_rows(values, indices), reference.gather_rows(x_scales, indices)
    value = torch.zeros(len(values), matrix.rows, dtype=torch.float64)
    total, num_terms = value.clone(), 2 * (weight.scales.shape[-1] + x_scales.shape[-1]) + 5
    for expert, slots in reference.segments(offsets):
        for group, begin in enumerate(range(0, matrix.cols, size)):
            a = values[slots, begin : begin + size].double()
            q = weight.q[expert, :, begin : begin + size].double()
            scale = weight.scales[expert, :, group].double() * weight.row_scales[expert].double()
            if weight.zeros is None:
                terms = [(a @ (q - 2 ** (bits - 1)).mT) * scale]
            else:
                zero = weight.zeros[expert, :, group].double() * 2.0 ** (bits - 8)
                terms = [(a @ q.mT) * scale, a.sum(-1, keepdim=True) * -scale * zero]
            for term in terms:
                value[slots] += term * x_scales[slots, begin // block, None].double()
                total[slots] += term.abs() * x_scales[slots, begin // block, None].double()
        if bias is not None:
            value[slots] += bias[expert].double()
            total[slots] += bias[expert].double().abs()
    return Bounded(value, C * num_terms * U32 * total).rounded(x.dtype)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_grouped_gemm(backend: str, case: Case, format: Form) -> None:
    layer = make_layer(case, bias=True)
    offsets, indices, _ = reference.plan(layer.topk_ids, case.num_experts)
    matrix = quantized(layer.gate_up_proj, format, parts=2)
    for dtype in DTYPES:
        x, bias = layer.x.to(dtype), layer.gate_up_bias.to(dtype)
        out = call(x, matrix, bias, offsets, indices)
        assert_close(out, product_bound(x, matrix, bias, offsets, indices))
        rows = reference.gather_rows(x, indices)
        assert torch.equal(call(rows, matrix, bias, offsets, None), out)

        grad = torch.randn(out.shape).to(dtype)
        bound = testing.gemm(exact(grad), matrix.plain().to(dtype).mT, None, offsets).rounded(dtype)
        assert_close(call(grad, matrix, None, offsets, None, True), bound, "transposed")


def test_the_integers_are_exact(kernels: str) -> None:
    """Symmetric rows have one float operation per factor after the sum, so the bits are those of the reference."""
    for columns in (5, 64, 1000):
        x, weight = torch.randn(33, columns), torch.randn(1, 80, columns)
        offsets, matrix = torch.tensor([0, 33], dtype=torch.int32), quantized(weight, Int8())
        out = call(x, matrix, None, offsets, None)
        with switchgear.use_backend("reference"):
            assert torch.equal(out, call(x, matrix, None, offsets, None))
    for (
        format
    ) in FORMATS:  # the ends of all ranges, without one wrap-around: the largest sum that 2^16 columns may have
        weight = torch.ones(1, 16, 1 << 16).where(torch.arange(1 << 16) % 2 == 0, -1.0)
        x = weight[0, :1] * 3
        out = call(x, quantized(weight, format), None, torch.tensor([0, 1], dtype=torch.int32), None)
        assert torch.allclose(out, torch.full_like(out, 3.0 * (1 << 16)), rtol=0.01)


def test_rows_of_any_bits(backend: str) -> None:
    x = torch.randn(6, 32)
    x[1], x[2], x[3, 5], x[4, 7] = 0.0, 2.0**-101, math.inf, math.nan
    matrix, offsets = quantized(torch.randn(1, 20, 32), Int8()), torch.tensor([0, 6], dtype=torch.int32)
    out = call(x, matrix, None, offsets, None)
    assert not out[1:3].any()
    assert bool(out[3:5].isnan().all())
    assert bool(out[[0, 5]].isfinite().all())
    tiny = call(x[:1] * 2.0**-99, matrix, None, offsets.clamp(max=1), None)
    assert torch.allclose(tiny * 2.0**99, out[:1])


def test_batch_invariant_and_deterministic(kernels: str) -> None:
    layer = make_layer(Case("rows", 250, 1, 2, 200, 100))
    layer = layer._replace(topk_ids=torch.zeros_like(layer.topk_ids))
    for format in (Int8(), Int4(), Int4(group_size=64, symmetric=False)):
        matrices = quantized(layer.gate_up_proj, format, 2), quantized(layer.down_proj, format)
        args = (*layer[5:], *GluOptions(), True)
        whole = forward(layer.x, matrices, None, None, *args)
        torch.set_num_threads(3)
        again = forward(layer.x, matrices, None, None, *args)
        torch.set_num_threads(1)
        assert torch.equal(whole[0], again[0])
        assert torch.equal(whole[1], again[1])
        for count in (1, 2, 5, 6, 11):
            rest = None, None, layer.topk_ids[:count], layer.topk_weights[:count], *args[2:]
            assert torch.equal(forward(layer.x[:count], matrices, *rest)[0], whole[0][:count])


def test_activations_have_a_scale_for_256_columns(backend: str) -> None:
    """Large activations in one block do not reduce the precision of the others; without groups a row has one."""
    x, weight = torch.randn(8, 600), torch.randn(1, 20, 600)
    weight[..., 256:512] = 0
    large, offsets = x.clone(), torch.tensor([0, 8], dtype=torch.int32)
    large[:, 256:512] *= 1e4
    for format in (Int4(), Int4(group_size=16, symmetric=False), Int8(group_size=64)):
        matrix = quantized(weight, format)
        assert torch.equal(call(large, matrix, None, offsets, None), call(x, matrix, None, offsets, None))
    matrix = quantized(weight, Int8())
    assert not torch.equal(call(large, matrix, None, offsets, None), call(x, matrix, None, offsets, None))


def test_one_expert_with_many_rows_among_those_with_one(kernels: str) -> None:
    """The mean is few rows per expert, so columns are split for reading; a token's bits do not change."""
    layer = make_layer(Case("popular", 23, 1, 4, 200, 300))
    layer = layer._replace(topk_ids=torch.tensor([0] * 20 + [1, 2, 3], dtype=torch.int32)[:, None])
    for format, options in ((Int8(), GluOptions()), (Int4(), GluOptions(interleaved=True))):
        matrices = quantized_layer(layer, options, format)
        args = (*options, False)
        whole = forward(layer.x, matrices, None, None, *layer[5:], *args)[0]
        for t in (0, 19, 21):
            one = (tensor[t : t + 1] for tensor in layer[5:])
            assert torch.equal(forward(layer.x[t : t + 1], matrices, None, None, *one, *args)[0][0], whole[t])


# ---- the whole layer -------------------------------------------------------------------------------------------------

OPTIONS = (
    GluOptions(),
    GluOptions("swiglu_oai", True, True, 1.702, 0.75),
    GluOptions("gelu", False),
    GluOptions("relu2", False),
    GluOptions("gelu_tanh", True, True),
)


def quantized_layer(layer: Layer, options: GluOptions, format: Form) -> tuple[Weight, Weight]:
    parts = 2 if options.gated and not options.interleaved else 1
    return quantized(layer.gate_up_proj, format, parts), quantized(layer.down_proj, format)


def check_layer(layer: Layer, options: GluOptions, format: Form) -> None:
    """h against grouped_gemm; y from this h by the stages, which have their own tests. Then the gradients."""
    dtype, (gate_up, down) = layer.x.dtype, quantized_layer(layer, options, format)
    rest = (layer.gate_up_bias, layer.down_bias, layer.topk_ids, layer.topk_weights, *options)
    y, h = forward(layer.x, (gate_up, down), *rest, True)
    alone, nothing = forward(layer.x, (gate_up, down), *rest, False)
    assert torch.equal(alone, y)
    assert nothing.shape == (0, gate_up.rows)

    plan = reference.plan(layer.topk_ids, layer.gate_up_proj.shape[0])
    h_bound = product_bound(layer.x, gate_up, layer.gate_up_bias, plan[0], plan[1])
    assert_close(h, h_bound, "h")
    if dtype is torch.float32:  # where h is what glu took
        permuted_y = call(ops.glu(h, *options), down, layer.down_bias, plan[0], None)
        assert_close(y, testing.combine(exact(permuted_y), plan, layer.topk_weights).rounded(dtype), "y")

    # Gradients are those of a layer with the decoded plain weights.
    plain = layer._replace(gate_up_proj=gate_up.plain().to(dtype), down_proj=down.plain().to(dtype))
    grad_y = torch.randn(layer.x.shape).to(dtype)
    wanted = testing.moe_backward(grad_y, h, plain, options)
    leaves = [
        None if t is None else t.detach().requires_grad_()
        for t in (layer.x, layer.gate_up_bias, layer.down_bias, layer.topk_weights)
    ]
    x, gate_up_bias, down_bias, topk_weights = leaves
    biases = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
    out = switchgear.moe(x, gate_up, down, layer.topk_ids, topk_weights, **biases, **options.keywords())
    assert torch.equal(out, y)
    out.backward(grad_y)
    for name, leaf, bound in zip(
        ("x", "gate_up_bias", "down_bias", "topk_weights"), leaves, wanted[:1] + wanted[3:], strict=True
    ):
        if leaf is not None:
            assert_close(leaf.grad, bound, f"gradient of {name}")


@pytest.mark.parametrize("format", FORMATS[::2], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer(backend: str, case: Case, format: Form) -> None:
    check_layer(make_layer(case, bias=True), GluOptions(), format)
    if case.name in ("plain", "odd_sizes"):
        check_layer(make_layer(case, torch.bfloat16), GluOptions(), format)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layer_options(backend: str, options: GluOptions) -> None:
    layer = make_layer(Case("options", 11, 2, 3, 34, 19, "holes"), gated=options.gated, bias=True)
    for format in (Int8(), Int4(group_size=16, symmetric=False)):
        check_layer(layer, options, format)


class Names(TorchDispatchMode):
    """Records the ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_past_the_dispatcher() -> None:
    """Plain tensors skip the dispatcher. A dispatch mode still sees the op, and the numbers are the same."""
    layer = make_layer(Case("dispatch", 5, 2, 3, 40, 24))
    matrices = quantized_layer(layer, GluOptions(), Int8())

    def run() -> Tensor:
        return switchgear.moe(layer.x, *matrices, *layer[5:])

    y, op = run(), "switchgear.moe_forward.default"
    with Names() as seen:
        assert torch.equal(run(), y)
    assert op in seen.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert torch.equal(run(), y)
    assert any(event.key == op.removesuffix(".default").replace(".", "::") for event in profile.key_averages())


def test_error_is_that_of_the_format() -> None:
    """Against the plain layer: rounding to int8 costs about 1 % for each of x, a, weights; 4 bits 8 % for weights."""
    layer = make_layer(Case("error", 64, 2, 4, 512, 256))
    y = switchgear.moe(*layer[:3], *layer[5:])
    for format, limit in ((Int8(), 0.03), (Int4(), 0.15)):
        z = switchgear.moe(layer.x, *quantized_layer(layer, GluOptions(), format), *layer[5:])
        assert float((z - y).norm() / y.norm()) < limit


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_arguments(backend: str) -> None:
    matrix = quantized(torch.randn(2, 32, 40), Int4())
    x, offsets = torch.randn(5, 40), torch.tensor([0, 2, 5], dtype=torch.int32)
    good = {"x": x, "matrix": matrix, "bias": None, "offsets": offsets, "indices": None}
    values, scales, row_scales = matrix.tensors

    def having(**changes: Any) -> dict[str, Weight]:
        return {"matrix": dataclasses.replace(matrix, **changes)}

    wrong = [
        (ValueError, "weight", {"x": x[:, 1:]}),
        (TypeError, "x", {"x": x.int()}),
        (ValueError, "weight", having(data=values[:, :1])),
        (TypeError, "weight", having(data=values.int())),
        (TypeError, "weight_scales", having(scales=scales.float())),
        (ValueError, "weight_row_scales", having(row_scales=row_scales[:, :1])),
        (ValueError, "weight_zeros", having(zeros=values[:, :, :1, :16])),
        (ValueError, "weight", having(group_size=24)),
        (ValueError, "weight", having(parts=3)),
        (ValueError, "bias", {"bias": torch.randn(2, 31)}),
        (ValueError, "expert_offsets", {"offsets": offsets + 1}),
        (ValueError, "token_indices", {"indices": torch.full((5,), 5, dtype=torch.int32)}),
    ]
    call(*good.values())  # type: ignore[arg-type]
    for error, message, change in wrong:
        with raises(error, message):
            call(*{**good, **change}.values())  # type: ignore[arg-type]
    with raises(ValueError, "bias"):
        call(torch.randn(5, 32), matrix, torch.randn(2, 32), offsets, None, True)


@pytest.mark.parametrize("form", [Int8(), Int4()])
def test_rows_that_no_kernel_multiplies_are_not_stored(form: Form) -> None:
    experts = switchgear.Experts(16, 2**16 + 32, 1)
    before = dict(experts.named_parameters())
    with raises(ValueError):
        switchgear.store(experts, form)
    assert [*experts.named_parameters()] == [*before.items()]


def test_formats_that_there_are_not() -> None:
    for size in (-1, 8, 48):
        with raises(ValueError, "group_size"):
            Int4(group_size=size)
