# SPDX-License-Identifier: BSD-3-Clause
"""Weights in panels: their order, and results with the bits of plain weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import switchgear
from errors import raises
from switchgear.reference import panels as reference_panels
from switchgear.reference.panels import PanelLayout
from switchgear.weights import Weight, encode
from switchgear.weights.exact import panel_layout
from switchgear.weights.weight import PANEL_DTYPES as DTYPES

H, I, E, K = 128, 192, 5, 2  # noqa: E741

BITS = {2: torch.int16, 4: torch.int32}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
LAYOUTS = {  # of the ISAs
    "amx": {torch.float32: (64, 64), torch.bfloat16: (64, 1024), torch.float16: (64, 32)},
    "avx512bf16": {torch.float32: (64, 64), torch.bfloat16: (64, 64), torch.float16: (64, 32)},
    "avx512": {torch.float32: (64, 64), torch.bfloat16: (64, 32), torch.float16: (64, 32)},
    "avx2": {torch.float32: (16, 32), torch.bfloat16: (16, 16), torch.float16: (16, 16)},
    "neon": {torch.float32: (16, 16), torch.bfloat16: (16, 8), torch.float16: (16, 8)},
    "generic": {torch.float32: (8, 16), torch.bfloat16: (8, 8), torch.float16: (8, 8)},
}


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = BITS[a.itemsize]
    return torch.equal(a.view(bits), b.view(bits))


def make_experts(**options: Any) -> switchgear.Experts:
    experts = switchgear.Experts(H, I, E, **{"dtype": torch.bfloat16} | options)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    return experts


def inputs(num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.rand(num_tokens, E).argsort(-1)[:, :K].int()
    return torch.randn(num_tokens, H).to(dtype), ids, torch.rand(num_tokens, K)


# ---- the order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", LAYOUTS)
@dtypes
@given(experts=st.integers(0, 3), panels=st.integers(1, 3), steps=st.integers(1, 100))
def test_nothing_is_lost(isa: str, dtype: torch.dtype, experts: int, panels: int, steps: int) -> None:
    layout = PanelLayout(*LAYOUTS[isa][dtype])
    columns = steps * reference_panels.COLUMNS
    bits = BITS[dtype.itemsize]
    limits = torch.iinfo(bits)
    shape = experts, panels * layout.rows, columns
    weight = torch.randint(limits.min, limits.max, shape, dtype=bits).view(dtype)
    packed = reference_panels.pack(weight, layout)
    assert packed.shape == (experts, panels, packed.shape[2], layout.vector_bytes)
    assert packed.nbytes == weight.nbytes
    assert same_bits(reference_panels.plain(packed, columns, dtype), weight)


def test_order_by_hand() -> None:
    """The generic kernels have 4 lanes of float32 and panels of 8 rows: one group of 2 adjacent vectors."""
    weight = torch.arange(8 * 32).view(1, 8, 32).float()
    words = reference_panels.pack(weight, PanelLayout(8, 16)).view(torch.float32).view(4, 8, 8)
    for place, lane in enumerate((0, 2, 1, 3)):
        assert torch.equal(words[place], weight[0, :, lane::4].T)


def test_layouts_of_the_isas(isa: str) -> None:
    if isa in LAYOUTS:
        assert {dtype: tuple(panel_layout(dtype)) for dtype in DTYPES} == LAYOUTS[isa]


# ---- results ---------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("kind", ["gated", "interleaved", "plain"])
def test_same_bits(isa: str, dtype: torch.dtype, kind: str) -> None:
    """All kinds of tiles, experts with more rows than a product, rows of one, two and three chunks."""
    options = {"gated": kind != "plain", "interleaved": kind == "interleaved"}
    for hidden_size, intermediate_size in ((128, 192), (2240, 64), (64, 1088)):
        gate_up = torch.randn(E, intermediate_size * (2 if options["gated"] else 1), hidden_size).to(dtype)
        down = torch.randn(E, hidden_size, intermediate_size).to(dtype) / 8
        stored = encode(gate_up, "panels", parts=2 if kind == "gated" else 1), encode(down, "panels")
        for num_tokens in (0, 1, 3, 16, 45, 700 if hidden_size == 128 else 24):
            x = torch.randn(num_tokens, hidden_size).to(dtype)
            ids = torch.rand(num_tokens, E).argsort(-1)[:, :K].int()
            ids[::3, 0] = -1
            weights = torch.rand(num_tokens, K)
            y = switchgear.moe(x, gate_up, down, ids, weights, **options)
            assert same_bits(switchgear.moe(x, *stored, ids, weights, **options), y), (hidden_size, num_tokens)


# ---- modules ---------------------------------------------------------------------------------------------------------


def test_autocast_reads_panels_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = make_experts()
    packed = copy.deepcopy(experts)
    switchgear.store(packed, "panels")
    x, ids, weights = inputs(5, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = experts(x, ids, weights)
        monkeypatch.setattr(Weight, "plain", None)
        assert torch.equal(packed(x, ids, weights), y)


@pytest.mark.filterwarnings("ignore:switchgear has no kernels for panels weights")
def test_another_isa(isa: str) -> None:
    """Panels of one ISA on another: in one process, or loaded on another machine."""
    experts = make_experts()
    packed = copy.deepcopy(experts)
    switchgear.store(packed, "panels")
    call = inputs(5)
    for other in switchgear.available_cpu_isas():
        switchgear.set_cpu_isa(other)
        with torch.no_grad():
            assert torch.equal(packed(*call), experts(*call))


def test_op() -> None:
    experts = make_experts()
    x, ids, weights = inputs(6)
    first, second = encode(experts.gate_up_proj, "panels", parts=2), encode(experts.down_proj, "panels")
    for save_h in (False, True):
        rest = (None, None, ids, weights, "silu", True, False, 1.702, 0.0, save_h)
        args = (x, first.tensors, first.form, second.tensors, second.form, *rest)
        torch.library.opcheck(torch.ops.switchgear.moe_forward.default, args)
        plain = (x, [experts.gate_up_proj.detach()], (), [experts.down_proj.detach()], (), *rest)
        with switchgear.use_backend("reference"):
            expected = torch.ops.switchgear.moe_forward(*plain)
            assert all(map(torch.equal, torch.ops.switchgear.moe_forward(*args), expected))


def test_errors() -> None:
    for model in (
        make_experts(dtype=torch.float64),
        switchgear.Experts(H, 66, 2, dtype=torch.bfloat16),
        switchgear.Experts(72, I, 2, dtype=torch.bfloat16),
    ):
        with raises(ValueError, "model"):
            switchgear.store(model, "panels")
        assert switchgear.restore(model) == 0
    experts = make_experts()
    first, second = encode(experts.gate_up_proj, "panels", parts=2), encode(experts.down_proj, "panels")
    x, ids, weights = inputs(3)
    rest = None, None, ids, weights, "silu", True, False, 1.702, 0.0, False
    cut = second.data[:, :, :-1].contiguous()
    for backend in switchgear.backends.BACKENDS:
        with switchgear.use_backend(backend), raises(ValueError, "down_proj"):
            torch.ops.switchgear.moe_forward(x, first.tensors, first.form, (cut,), second.form, *rest)
