# SPDX-License-Identifier: BSD-3-Clause
"""Experts of 8 and 4 bits: what the formats hold, the kernels against the reference, and modules."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from switchgear.compress import Format
from switchgear.compress.formats import QuantizedMatrix
from switchgear.compress.quantize import plain_weight, quantized_weight
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import switchgear
from backends_in_use import QUANTIZED_ISAS, backend_named, kernels_of
from switchgear import compress, ops, reference, testing
from switchgear import reference_quantized as rq
from switchgear.testing import CASES, U32, Bounded, Case, GluOptions, Layer, assert_close, exact, make_layer

C = testing.C
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (
    Format("int8"),
    Format("int8", 64, symmetric=False),
    Format("int4"),
    Format("int4", 16, symmetric=False),
    Format("int4", 128),
)


@pytest.fixture(params=QUANTIZED_ISAS)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels_of(request.param):
        yield request.param


@pytest.fixture(params=["reference", *QUANTIZED_ISAS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with backend_named(request.param):
        yield request.param


def quantized(weight: Tensor, format: Format, parts: int = 1) -> QuantizedMatrix:
    return QuantizedMatrix(quantized_weight(weight, parts, format), *weight.shape[1:], parts, format)


def call(
    x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None, offsets: Tensor, indices: Tensor | None, flip: bool = False
):
    return ops.quantized_grouped_gemm(x, *matrix.weight, bias, offsets, indices, *matrix.sizes(), flip)


# ---- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(2, 40, 96), (3, 17, 37), (1, 1, 1)], ids=str)
def test_levels_are_the_nearest(format: Format, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    size = format.columns_per_scale
    levels = rq.quantize(weight, format.bits, size, format.symmetric)
    plain, q = rq.dequantize(levels, format.bits, size), levels.q
    step = (
        (levels.scales.float() * levels.row_scales[..., None])
        .abs()
        .repeat_interleave(size or shape[2], -1)[..., : shape[2]]
    )
    low, high = (
        rq.dequantize(levels._replace(q=torch.full_like(q, end)), format.bits, size) for end in (0, 2**format.bits - 1)
    )
    inside = (weight >= torch.minimum(low, high)) & (weight <= torch.maximum(low, high))
    assert bool(((plain - weight).abs() <= step * 0.5001 + 1e-7)[inside].all())
    if format.bits == 8 and format.symmetric:
        assert bool(inside.all())
        assert int(q.min()) >= 1
    relative = float((plain - weight).norm() / weight.norm())
    assert relative < (0.012 if format.bits == 8 else 0.11)


def test_int4_is_closer_than_the_rounding_of_the_range() -> None:
    """The rule that needs no search: the extreme of a group maps to -8."""
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
            plain = plain_weight(quantized(weight, format))
            assert torch.allclose(plain, weight, rtol=2**-8, atol=0), (format, value)
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError, match="weight: expected finite numbers"):
                quantized(torch.full((1, 3, 40), value), format)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("columns", [1, 8, 37, 200])
def test_storage(format: Format, parts: int, columns: int) -> None:
    """The bytes are where ops.h says they are, and come back."""
    weight = torch.randn(2, 38, columns)
    plain = rq.quantize(weight, format.bits, format.columns_per_scale, format.symmetric)
    blocks = rq.to_blocks(plain, format.bits, parts)
    back = rq.from_blocks(blocks, 38, columns, format.bits, parts)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(back, plain, strict=True))
    per_part = 38 // parts
    for row, column in ((0, 0), (17, columns - 1), (37, columns // 2)):
        block = row // per_part * -(-per_part // 16) + row % per_part // 16
        at = 4 * (row % per_part % 16) + column % 4
        if format.bits == 8:
            q = blocks.values[1, block, column // 4, at]
        else:
            byte = blocks.values[1, block, column // 8, at]
            q = byte >> 4 if column % 8 >= 4 else byte & 15
        assert q == plain.q[1, row, column]
        group = column // format.columns_per_scale if format.columns_per_scale else 0
        assert blocks.scales[1, block, group, row % per_part % 16] == plain.scales[1, row, group]


# ---- grouped_gemm ----------------------------------------------------------------------------------------------------


def product_bound(
    x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None, offsets: Tensor, indices: Tensor | None
) -> Bounded:
    """The integers are exact, so only the float operations count: two for each group and for each block of activations,
    the row's scale, the bias."""
    format = matrix.format
    weight = rq.from_blocks(matrix.weight, matrix.rows, matrix.columns, format.bits, matrix.parts)
    size = format.columns_per_scale or matrix.columns
    block = rq.activation_block(format.columns_per_scale, matrix.columns)
    values, x_scales = rq.quantize_rows(x, block)
    if indices is not None:
        values, x_scales = reference.gather_rows(values, indices), reference.gather_rows(x_scales, indices)
    value = torch.zeros(len(values), matrix.rows, dtype=torch.float64)
    total, num_terms = value.clone(), 2 * (weight.scales.shape[-1] + x_scales.shape[-1]) + 5
    for expert, slots in reference.segments(offsets):
        for group, begin in enumerate(range(0, matrix.columns, size)):
            a = values[slots, begin : begin + size].double()
            q = weight.q[expert, :, begin : begin + size].double()
            scale = weight.scales[expert, :, group].double() * weight.row_scales[expert].double()
            if weight.zeros is None:
                terms = [(a @ (q - 2 ** (format.bits - 1)).mT) * scale]
            else:
                zero = weight.zeros[expert, :, group].double() * 2.0 ** (format.bits - 8)
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
def test_grouped_gemm(backend: str, case: Case, format: Format) -> None:
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
        bound = testing.gemm(exact(grad), plain_weight(matrix).to(dtype).mT, None, offsets).rounded(dtype)
        assert_close(call(grad, matrix, None, offsets, None, True), bound, "transposed")


def test_the_integers_are_exact(kernels: str) -> None:
    """Symmetric rows have one float operation after the sum for each factor: the bits of the reference."""
    for columns in (5, 64, 1000):
        x, weight = torch.randn(33, columns), torch.randn(1, 80, columns)
        offsets, matrix = torch.tensor([0, 33], dtype=torch.int32), quantized(weight, Format("int8"))
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
    matrix, offsets = quantized(torch.randn(1, 20, 32), Format("int8")), torch.tensor([0, 6], dtype=torch.int32)
    out = call(x, matrix, None, offsets, None)
    assert not out[1:3].any()
    assert bool(out[3:5].isnan().all())
    assert bool(out[[0, 5]].isfinite().all())
    tiny = call(x[:1] * 2.0**-99, matrix, None, offsets.clamp(max=1), None)
    assert torch.allclose(tiny * 2.0**99, out[:1])


def test_batch_invariant_and_deterministic(kernels: str) -> None:
    layer = make_layer(Case("rows", 250, 1, 2, 200, 100))
    layer = layer._replace(topk_ids=torch.zeros_like(layer.topk_ids))
    for format in (Format("int8"), Format("int4"), Format("int4", 64, symmetric=False)):
        matrices = quantized(layer.gate_up_proj, format, 2), quantized(layer.down_proj, format)
        args = (*layer[5:], 100, format.bits, format.columns_per_scale, *GluOptions(), True)
        whole = ops.quantized_moe_forward(layer.x, *matrices[0].weight, *matrices[1].weight, None, None, *args)
        torch.set_num_threads(3)
        again = ops.quantized_moe_forward(layer.x, *matrices[0].weight, *matrices[1].weight, None, None, *args)
        torch.set_num_threads(1)
        assert torch.equal(whole[0], again[0])
        assert torch.equal(whole[1], again[1])
        for count in (1, 2, 5, 6, 11):
            some = layer.x[:count], *matrices[0].weight, *matrices[1].weight, None, None
            rest = layer.topk_ids[:count], layer.topk_weights[:count], *args[2:]
            assert torch.equal(ops.quantized_moe_forward(*some, *rest)[0], whole[0][:count])


def test_activations_have_a_scale_for_256_columns(backend: str) -> None:
    """Large activations in one block leave the others as precise as they were; without groups the row has one scale."""
    x, weight = torch.randn(8, 600), torch.randn(1, 20, 600)
    weight[..., 256:512] = 0
    large, offsets = x.clone(), torch.tensor([0, 8], dtype=torch.int32)
    large[:, 256:512] *= 1e4
    for format in (Format("int4"), Format("int4", 16, symmetric=False), Format("int8", 64)):
        matrix = quantized(weight, format)
        assert torch.equal(call(large, matrix, None, offsets, None), call(x, matrix, None, offsets, None))
    matrix = quantized(weight, Format("int8"))
    assert not torch.equal(call(large, matrix, None, offsets, None), call(x, matrix, None, offsets, None))


def test_one_expert_with_many_rows_among_those_with_one(kernels: str) -> None:
    """Tokens on average have few rows for an expert, so columns are cut for reading; a token's bits stay the same."""
    layer = make_layer(Case("popular", 23, 1, 4, 200, 300))
    layer = layer._replace(topk_ids=torch.tensor([0] * 20 + [1, 2, 3], dtype=torch.int32)[:, None])
    for format, options in ((Format("int8"), GluOptions()), (Format("int4"), GluOptions(interleaved=True))):
        matrices = quantized_layer(layer, options, format)
        args = (300, format.bits, format.columns_per_scale, *options, False)
        weights = (*matrices[0].weight, *matrices[1].weight, None, None)
        whole = ops.quantized_moe_forward(layer.x, *weights, *layer[5:], *args)[0]
        for t in (0, 19, 21):
            one = (tensor[t : t + 1] for tensor in layer[5:])
            assert torch.equal(ops.quantized_moe_forward(layer.x[t : t + 1], *weights, *one, *args)[0][0], whole[t])


# ---- the whole layer -------------------------------------------------------------------------------------------------

OPTIONS = (
    GluOptions(),
    GluOptions("swiglu_oai", True, True, 1.702, 0.75),
    GluOptions("gelu", False),
    GluOptions("relu2", False),
    GluOptions("gelu_tanh", True, True),
)


def quantized_layer(layer: Layer, options: GluOptions, format: Format) -> tuple[QuantizedMatrix, QuantizedMatrix]:
    parts = 2 if options.gated and not options.interleaved else 1
    return quantized(layer.gate_up_proj, format, parts), quantized(layer.down_proj, format)


def check_layer(layer: Layer, options: GluOptions, format: Format) -> None:
    """h as grouped_gemm has it; y from this very h by the stages, which are tested on their own. Then the gradients."""
    dtype, (gate_up, down) = layer.x.dtype, quantized_layer(layer, options, format)
    tensors = (*gate_up.weight, *down.weight, layer.gate_up_bias, layer.down_bias, layer.topk_ids, layer.topk_weights)
    sizes = (down.columns, format.bits, format.columns_per_scale)
    y, h = ops.quantized_moe_forward(layer.x, *tensors, *sizes, *options, True)
    alone, nothing = ops.quantized_moe_forward(layer.x, *tensors, *sizes, *options, False)
    assert torch.equal(alone, y)
    assert nothing.shape == (0, gate_up.rows)

    plan = reference.plan(layer.topk_ids, layer.gate_up_proj.shape[0])
    h_bound = product_bound(layer.x, gate_up, layer.gate_up_bias, plan[0], plan[1])
    assert_close(h, h_bound, "h")
    if dtype is torch.float32:  # where h is what glu took
        permuted_y = call(ops.glu(h, *options), down, layer.down_bias, plan[0], None)
        assert_close(y, testing.combine(exact(permuted_y), plan, layer.topk_weights).rounded(dtype), "y")

    # Gradients are those of a layer with the plain weights that the levels stand for.
    plain = layer._replace(gate_up_proj=plain_weight(gate_up).to(dtype), down_proj=plain_weight(down).to(dtype))
    grad_y = torch.randn(layer.x.shape).to(dtype)
    wanted = testing.moe_backward(grad_y, h, plain, options)
    leaves = [
        None if t is None else t.detach().requires_grad_()
        for t in (layer.x, layer.gate_up_bias, layer.down_bias, layer.topk_weights)
    ]
    x, gate_up_bias, down_bias, topk_weights = leaves
    out = compress.formats.quantized_moe(
        x, gate_up, down, layer.topk_ids, topk_weights, gate_up_bias=gate_up_bias, down_bias=down_bias,
        **{**options._asdict(), "limit": options.limit or None},
    )  # fmt: skip
    assert torch.equal(out, y)
    out.backward(grad_y)
    for name, leaf, bound in zip(
        ("x", "gate_up_bias", "down_bias", "topk_weights"), leaves, wanted[:1] + wanted[3:], strict=True
    ):
        if leaf is not None:
            assert_close(leaf.grad, bound, f"gradient of {name}")


@pytest.mark.parametrize("format", FORMATS[::2], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer(backend: str, case: Case, format: Format) -> None:
    check_layer(make_layer(case, bias=True), GluOptions(), format)
    if case.name in ("plain", "odd_sizes"):
        check_layer(make_layer(case, torch.bfloat16), GluOptions(), format)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layer_options(backend: str, options: GluOptions) -> None:
    layer = make_layer(Case("options", 11, 2, 3, 34, 19, "holes"), gated=options.gated, bias=True)
    for format in (Format("int8"), Format("int4", 16, symmetric=False)):
        check_layer(layer, options, format)


class Names(TorchDispatchMode):
    """The ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_past_the_dispatcher() -> None:
    """Plain tensors need no dispatch; who looks on sees the op all the same, and gets the same numbers."""
    layer = make_layer(Case("dispatch", 5, 2, 3, 40, 24))
    matrices = quantized_layer(layer, GluOptions(), Format("int8"))

    def run() -> Tensor:
        return compress.formats.quantized_moe(layer.x, *matrices, *layer[5:])

    y, op = run(), "switchgear.quantized_moe_forward.default"
    with Names() as seen:
        assert torch.equal(run(), y)
    assert op in seen.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert torch.equal(run(), y)
    assert any(event.key == op.removesuffix(".default").replace(".", "::") for event in profile.key_averages())


def test_error_is_that_of_the_format() -> None:
    """Against the plain layer: rounding to int8 costs some 1 % for each of x, a, weights; 4 bits 8 % for weights."""
    layer = make_layer(Case("error", 64, 2, 4, 512, 256))
    y = switchgear.moe(*layer[:3], *layer[5:])
    for format, limit in ((Format("int8"), 0.03), (Format("int4"), 0.15)):
        z = compress.formats.quantized_moe(layer.x, *quantized_layer(layer, GluOptions(), format), *layer[5:])
        assert float((z - y).norm() / y.norm()) < limit


# ---- modules ---------------------------------------------------------------------------------------------------------

KINDS = [{}, {"bias": True}, {"gated": False}, {"interleaved": True}, {"transposed": True, "bias": True}]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind) or "plain")
def test_module(kind: dict[str, bool], dtype: str) -> None:
    moe = switchgear.MoE(64, 48, 4, 2, **kind)  # type: ignore[arg-type]
    before, x = copy.deepcopy(moe), torch.randn(2, 5, 64)
    assert compress.quantize(moe, dtype) == 1
    assert compress.quantize(moe, dtype) == 1
    y = moe(x)
    first = "gate_up_proj" if kind.get("gated", True) else "up_proj"
    assert {f"experts.{first}_values", "experts.down_proj_scales"} <= set(moe.state_dict())
    assert f"experts.{first}" not in moe.state_dict()
    assert dtype in repr(moe.experts)
    assert moe.experts.format == Format(dtype)

    twin = copy.deepcopy(before)
    compress.quantize(twin, dtype)
    for name, buffer in twin.experts.named_buffers():
        if "values" in name:
            buffer.zero_()
    assert not torch.equal(twin(x), y)
    twin.load_state_dict(moe.state_dict())
    assert torch.equal(twin(x), y)
    twin.load_state_dict(before.state_dict())  # a plain checkpoint is quantised on its way in
    assert torch.equal(twin(x), y)
    for duplicate in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert torch.equal(duplicate(x), y)
    with torch.no_grad():
        torch.compiler.reset()  # there is a limit of graphs of one function in a process
        assert torch.equal(torch.compile(moe, fullgraph=True, backend="eager")(x), y)

    assert compress.dequantize(moe) == 1
    assert compress.dequantize(moe) == 0
    assert moe.experts.format is None
    assert [(name, tuple(p.shape)) for name, p in moe.named_parameters()] == [
        (name, tuple(p.shape)) for name, p in before.named_parameters()
    ]
    assert float((moe(x) - y).norm() / y.norm()) < 0.03  # what is left is the rounding of activations
    assert float((moe(x) - before(x)).norm() / y.norm()) < (0.02 if dtype == "int8" else 0.2)


def test_gradients_reach_what_is_not_frozen() -> None:
    moe = switchgear.MoE(64, 48, 4, 2, bias=True)
    before = copy.deepcopy(moe)
    compress.quantize(moe, "int8")
    x = torch.randn(9, 64)
    grads = []
    for model in (moe, before):
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        grads.append({"x": leaf.grad, **{name: p.grad for name, p in model.named_parameters()}})
    assert set(grads[1]) - set(grads[0]) == {"experts.gate_up_proj", "experts.down_proj"}
    for name, grad in grads[0].items():
        assert float((grad - grads[1][name]).norm() / grads[1][name].norm()) < 0.05, name


@pytest.mark.parametrize("dtype", [None, "int8", "int4"])
def test_lora(dtype: str | None) -> None:
    experts = switchgear.Experts(64, 48, 4, bias=True)
    if dtype is not None:
        compress.quantize(experts, dtype)
    ids, weights = torch.rand(9, 4).argsort(-1)[:, :2].int(), torch.rand(9, 2)
    x, target = torch.randn(9, 64), torch.randn(9, 64)
    y = experts(x, ids, weights)
    adapters = compress.add_lora(experts, 4, alpha=8)
    torch.testing.assert_close(experts(x, ids, weights), y)  # B is zero
    optimizer, losses = torch.optim.Adam(adapters, 0.02), []
    for _ in range(40):
        loss = (experts(x, ids, weights) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]
    assert all(adapter.grad is not None for adapter in adapters)
    frozen = [name for name, p in experts.named_parameters() if p.grad is None]
    assert frozen == ([] if dtype else ["gate_up_proj", "down_proj"])
    twin = copy.deepcopy(experts)
    twin.load_state_dict(experts.state_dict())
    assert torch.equal(twin(x, ids, weights), experts(x, ids, weights))
    with pytest.raises(ValueError, match="experts: expected none with adapters already"):
        compress.add_lora(experts, 4)
    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        compress.add_lora(switchgear.Experts(8, 8, 1), 0)


def test_errors() -> None:
    with pytest.raises(ValueError, match="dtype: expected one of int8, int4, got 'int3'"):
        compress.quantize(switchgear.Experts(16, 16, 2), "int3")
    for size in (-1, 8, 48):
        with pytest.raises(ValueError, match=f"group_size: expected 0 .* got {size}"):
            compress.quantize(switchgear.Experts(16, 16, 2), "int4", group_size=size)
    with pytest.raises(ValueError, match="model: expected experts that run on the fused kernel, Linear has none"):
        compress.quantize(torch.nn.Linear(2, 2), "int8")
    experts = switchgear.Experts(32, 16, 2)
    compress.quantize(experts, "int4")
    with pytest.raises(ValueError, match="model: expected plain weights, got int4, groups of 32, symmetric"):
        compress.quantize(experts, "int8")
    other = switchgear.Experts(32, 16, 2)
    compress.quantize(other, "int8")
    with pytest.raises(RuntimeError, match="size mismatch for gate_up_proj_values"):
        other.load_state_dict(experts.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*gate_up_proj_values"):
        switchgear.Experts(32, 16, 2).load_state_dict(experts.state_dict())
    with pytest.raises(ValueError, match=r"gate_up_proj: expected shape \[2, 32, 32\], got \[2, 64, 32\]"):
        other.load_state_dict(switchgear.Experts(32, 32, 2).state_dict())
    ids, weights = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    with pytest.raises(ValueError, match="topk_ids"):
        experts(torch.randn(3, 32), ids + 2, weights)
    with pytest.raises(TypeError, match=r"gate_up_proj_row_scales: expected torch\.float32, got torch\.float16"):
        experts.half()(torch.randn(3, 32), ids, weights)


def test_arguments(backend: str) -> None:
    matrix = quantized(torch.randn(2, 32, 40), Format("int4"))
    x, offsets = torch.randn(5, 40), torch.tensor([0, 2, 5], dtype=torch.int32)
    good = {"x": x, "matrix": matrix, "bias": None, "offsets": offsets, "indices": None}
    values, scales, row_scales, _ = matrix.weight

    def with_weight(*weight: Tensor | None) -> dict[str, object]:
        return {"matrix": matrix._replace(weight=rq.Quantized(*weight))}  # type: ignore[arg-type]

    wrong = [
        (ValueError, "x: expected", {"x": x[:, 1:]}),
        (TypeError, "x: expected", {"x": x.int()}),
        (ValueError, "weight: expected", with_weight(values[:, :1], scales, row_scales, None)),
        (TypeError, "weight: expected", with_weight(values.int(), scales, row_scales, None)),
        (TypeError, "weight_scales: expected", with_weight(values, scales.float(), row_scales, None)),
        (ValueError, "weight_row_scales: expected", with_weight(values, scales, row_scales[:, :1], None)),
        (ValueError, "weight_zeros: expected", with_weight(values, scales, row_scales, values[:, :, :1, :16])),
        (ValueError, "bits: expected 8 or 4", {"matrix": matrix._replace(format=_Bits(3, 32))}),
        (ValueError, "group_size: expected", {"matrix": matrix._replace(format=_Bits(4, 24))}),
        (ValueError, "parts: expected", {"matrix": matrix._replace(parts=3)}),
        (ValueError, "bias: expected", {"bias": torch.randn(2, 31)}),
        (ValueError, "expert_offsets: expected", {"offsets": offsets + 1}),
        (ValueError, "token_indices: expected", {"indices": torch.full((5,), 5, dtype=torch.int32)}),
    ]
    call(*good.values())  # type: ignore[arg-type]
    for error, message, change in wrong:
        with pytest.raises(error, match=message):
            call(*{**good, **change}.values())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bias: expected none for a transposed weight"):
        call(torch.randn(5, 32), matrix, torch.randn(2, 32), offsets, None, True)


class _Bits:
    """A format that Format refuses."""

    def __init__(self, bits: int, group_size: int) -> None:
        self.bits, self.columns_per_scale = bits, group_size


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_a_model_of_transformers(kind: str, dtype: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_local_experts=4, max_position_embeddings=64, pad_token_id=0,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    switchgear.accelerate(model)
    prompt = torch.arange(1, 9)[None]
    logits = model(prompt).logits
    assert compress.quantize(model, dtype) == 2
    quantized_logits = model(prompt).logits
    assert float((quantized_logits - logits).norm() / logits.norm()) < (0.02 if dtype == "int8" else 0.2)
    quantized_logits.square().mean().backward()
    assert model.model.embed_tokens.weight.grad.any()
    twin = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    switchgear.accelerate(twin)
    compress.quantize(twin, dtype)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(prompt).logits, quantized_logits)
    assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape == (1, 12)
    assert compress.dequantize(model) == 2
    assert model(prompt).logits.shape == logits.shape
