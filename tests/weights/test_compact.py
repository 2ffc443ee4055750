# SPDX-License-Identifier: BSD-3-Clause
"""Compact weights: the contents of the format, and results with the bits of plain weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import switchgear
from errors import raises
from switchgear.reference import compact as reference_compact
from switchgear.weights import Weight, stored_of
from switchgear.weights.exact import compacted

H, I, E, K = 512, 384, 5, 2  # noqa: E741

BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
dtypes = pytest.mark.parametrize("dtype", BITS, ids=lambda dtype: str(dtype).removeprefix("torch."))
# float32 weights with bfloat16 values have a format of their own
weights_of = pytest.mark.parametrize("of_kind", ["bfloat16", "float32", "low"], indirect=True)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.dtype])


def any_bits(*shape: int) -> Tensor:
    """Every pattern of the upper half: infinities, NaN with payloads, subnormals, both zeros."""
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32).view(torch.float32)


def wide(*shape: int) -> Tensor:
    """Finite, but with so many magnitudes that a tenth of them are exceptions."""
    return torch.randn(shape) * torch.exp2(torch.randint(-12, 1, shape).float())


def sparse(*shape: int) -> Tensor:
    """Half of them are zeros, of either sign."""
    return torch.randn(shape) * torch.randint(0, 2, shape)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


KINDS = (normal, wide, sparse)


def upper_half(weight: Tensor) -> Tensor:
    """The upper half of each float32 as bfloat16, of any bit pattern."""
    return (weight.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


@pytest.fixture
def of_kind(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    def low(weight: Tensor) -> Tensor:
        return weight.view(torch.int32).bitwise_and(-(1 << 16)).view(torch.float32)

    return {"bfloat16": upper_half, "float32": lambda weight: weight, "low": low}[request.param]


def make_experts(**options: Any) -> switchgear.Experts:
    experts = switchgear.Experts(H, I, E, **{"dtype": torch.bfloat16} | options)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    return experts


def inputs(num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.rand(num_tokens, E).argsort(-1)[:, :K].int()
    return torch.randn(num_tokens, H).to(dtype), ids, torch.rand(num_tokens, K)


def compact(experts: switchgear.Experts) -> switchgear.Experts:
    packed = copy.deepcopy(experts)
    switchgear.store(packed, "compact")
    return packed


def stored_weights(experts: nn.Module) -> tuple[Weight, Weight]:
    stored = stored_of(experts)
    assert stored is not None
    return stored.weights(experts)


def weight_of(rows: Tensor, columns: int, dtype: torch.dtype) -> Weight:
    """A weight of `dtype` with these compact rows."""
    return Weight("compact", rows, rows.shape[1], columns, dtype, elements=dtype)


def test_slots_without_experts_may_hold_anything() -> None:
    """As after a read that failed: no row is asked how many bytes its elements have."""
    torch.manual_seed(0)
    experts = switchgear.Experts(512, 512, 4).eval()
    stored = stored_weights(compact(experts))
    x, ids, topk_weights = torch.randn(3, 512), torch.full((3, 1), 2, dtype=torch.int32), torch.rand(3, 1)
    with torch.no_grad():
        wanted = experts(x, ids, topk_weights)
    for garbage in (0, 2, 0xAA):
        moved = []
        for weight in stored:
            data = torch.full_like(weight.data, garbage)
            data[3] = weight.data[2]
            moved.append(weight.with_tensors({"data": data, "slots": torch.tensor([0, 1, 3, 2], dtype=torch.int32)}))
        assert torch.equal(switchgear.functional.moe(x, *moved, ids, topk_weights), wanted)


# ---- the format ------------------------------------------------------------------------------------------------------


@weights_of
@pytest.mark.parametrize("make", [*KINDS, any_bits], ids=lambda make: make.__name__)
@given(experts=st.integers(1, 3), rows=st.integers(1, 5), columns=st.integers(1, 400))
def test_nothing_is_lost(of_kind: Any, make: Any, experts: int, rows: int, columns: int) -> None:
    weight = of_kind(make(experts, rows, columns))
    matrix = compacted(weight)
    assert torch.equal(matrix.data, reference_compact.compact(weight))
    assert torch.equal(bits(matrix.plain()), bits(weight))
    element_bytes = matrix.elements.itemsize
    assert torch.equal(bits(reference_compact.plain(matrix.data, columns, weight.dtype, element_bytes)), bits(weight))


def test_bytes() -> None:
    """12 or 28 bits, plus a header of 64 bytes per row, if rows have few exceptions."""
    weight = torch.randn(2, 16, 2048) * 0.02
    assert compacted(weight.bfloat16()).data.shape == (2, 16, 64 + 2048 * 3 // 2)
    assert compacted(weight.bfloat16().float()).data.shape == (2, 16, 64 + 2048 * 3 // 2)
    assert compacted(weight).data.shape == (2, 16, 64 + 2048 * 7 // 2)
    sixteen = torch.randint(1 << 14, (16 << 7) + (1 << 14), (1, 4, 256)).to(torch.int16).view(torch.bfloat16)
    stored = compacted(sixteen).data
    assert stored.shape == (1, 4, 64 + 256 * 3 // 2)
    assert stored[..., :16].tolist() == [[list(range(128, 144))] * 4]
    assert stored[..., 18].eq(2).all()
    assert not stored[..., [16, 17, *range(19, 64)]].any()


def test_exceptions_by_hand() -> None:
    weight = torch.ones(1, 2, 130, dtype=torch.bfloat16) * torch.exp2(torch.arange(130) % 16).bfloat16()
    weight[0, 1, 7], weight[0, 1, 129] = -3e38, 0.0
    header = compacted(weight).data[0, :, :64]
    assert header[0, 16:].tolist() == [0, 0, 2] + [0] * 45
    expected = torch.tensor([2, 7, int(bits(weight[0, 1, 7])), 129, 0]).to(torch.int16)
    assert header[1, 16:18].view(torch.int16) == expected[:1]
    assert torch.equal(header[1, 20:28].view(torch.int16), expected[1:])


@weights_of
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("kind", ["forward", "grouped_gemm"])
@pytest.mark.some(8)
def test_same_bits(isa: str, of_kind: Any, make: Any, kind: str) -> None:
    """All kinds of tiles, experts with more rows than a product, rows longer than a chunk, partial panels."""
    for hidden_size, intermediate_size in ((300, 200), (2200, 70), (1, 1)):
        gate_up = of_kind(make(E, 2 * intermediate_size, hidden_size))
        down = of_kind(make(E, hidden_size, intermediate_size))
        stored = compacted(gate_up), compacted(down)
        for num_tokens in (0, 1, 3, 16, 70, 700 if hidden_size == 300 else 24):
            x = torch.randn(num_tokens, hidden_size).to(down.dtype)
            ids = torch.rand(num_tokens, E).argsort(-1)[:, :K].int()
            if kind == "forward":
                call = ids, torch.rand(num_tokens, K)
                y = switchgear.moe(x, gate_up, down, *call)
                got = switchgear.moe(x, *stored, *call)
            else:
                plan = switchgear.plan(ids, E)
                y, got = (
                    switchgear.grouped_gemm(x, weight, plan.expert_offsets, token_indices=plan.token_indices)
                    for weight in (gate_up, stored[0])
                )
            assert torch.equal(bits(got), bits(y)), (hidden_size, num_tokens)


@dtypes
def test_any_bytes_are_read_safely(isa: str, dtype: torch.dtype) -> None:
    """Corrupt rows: too many exceptions, at columns out of range and out of order."""
    for _ in range(20):
        rows = torch.randint(0, 256, (E, 2 * I, 64 + reference_compact.records_bytes(H, dtype))).to(torch.uint8)
        down = torch.randint(0, 256, (E, H, 128 + reference_compact.records_bytes(I, dtype))).to(torch.uint8)
        rows[0, 0, 18] = down[0, 0, 18] = dtype.itemsize  # the only byte that is checked
        for num_tokens in (2, 50):
            weights = weight_of(rows, H, dtype), weight_of(down, I, dtype)
            y = switchgear.moe(inputs(num_tokens, dtype)[0], *weights, *inputs(num_tokens)[1:])
            assert y.shape == (num_tokens, H)


# ---- modules ---------------------------------------------------------------------------------------------------------


def test_checkpoints_in_bfloat16_loaded_as_float32() -> None:
    """Each projection takes the form that it supports, also when others are loaded."""
    experts = make_experts(dtype=torch.float32)
    with torch.no_grad():
        experts.gate_up_proj.copy_(experts.gate_up_proj.bfloat16())
    packed = compact(experts)
    call = inputs(3, torch.float32)
    for stored in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        assert tuple(weight.elements for weight in stored_weights(packed)) == stored
        with torch.no_grad():
            assert torch.equal(packed(*call), experts(*call))
            experts.gate_up_proj.add_(1e-5)
            experts.down_proj.copy_(experts.down_proj.bfloat16())
        packed.load_state_dict(experts.state_dict())
    assert switchgear.restore(packed) == 1
    assert torch.equal(packed.down_proj, experts.down_proj)


def test_autocast_and_other_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, ids, weights = inputs(5, torch.float32)
    low = make_experts().float()  # its rows hold bfloat16 values and are read unchanged
    packed = compact(low)
    monkeypatch.setattr(Weight, "plain", None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(x, ids, weights), low(x, ids, weights))
    monkeypatch.undo()
    with torch.no_grad():
        low.gate_up_proj.add_(1e-4)
        packed = compact(low)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(packed(x, ids, weights), low(x, ids, weights))
    with raises(TypeError, "gate_up_proj"):
        packed(x.bfloat16(), ids, weights)


def test_errors() -> None:
    mixed = make_experts()
    mixed.down_proj = nn.Parameter(mixed.down_proj.float())
    for model in (
        make_experts(dtype=torch.float16),
        mixed,
        switchgear.Experts(64, 64, 2, dtype=torch.bfloat16),
    ):
        with raises(ValueError, "model"):
            switchgear.store(model, "compact")
        assert switchgear.restore(model) == 0
    with raises(TypeError, "weight"):
        reference_compact.compact(torch.zeros(1, 1, 1, dtype=torch.float16))
    with raises(ValueError, "weight"):
        reference_compact.compact(torch.zeros(1, 1, 32769, dtype=torch.bfloat16))

    first, second = stored_weights(compact(make_experts()))
    x, ids, weights = inputs(3)
    for bad, reason in (
        (first.data[:, :, :-1].contiguous(), "gate_up_proj"),
        (first.data[:, :, :768].contiguous(), "gate_up_proj"),
        (first.data.mT, "gate_up_proj"),
    ):
        y = torch.full_like(x, 7)
        weights_in = [bad], first.form, second.tensors, second.form, None, None
        layer = switchgear.ops.Layer(*weights_in, ids, weights, *switchgear.ops.GluOptions())
        with raises(ValueError, reason):
            switchgear.ops.host.module.moe_forward((x,), layer, (y, None), switchgear.ops.host.execution())
        assert bool((y == 7).all())

    def call(x: Tensor, first: Weight, second: Weight) -> Tensor:
        rest = None, None, ids, weights, "silu", True, False, 1.702, 0.0, False
        return switchgear.ops.moe_forward(x, first.tensors, first.form, second.tensors, second.form, *rest)[0]

    with raises(TypeError, "gate_up_proj"):
        call(x.half(), first, second)
    rows = reference_compact.compact(torch.full((1, 4, 512), 0.1))
    with raises(TypeError, "gate_up_proj"):
        call(x, *[Weight("compact", rows, 4, 512, torch.bfloat16, elements=torch.float32)] * 2)
    with raises(TypeError, "compact"):
        weight_of(rows, 512, torch.bfloat16).plain()
