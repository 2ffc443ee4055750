# SPDX-License-Identifier: BSD-3-Clause
"""Weights in panels: their order, results with the bits of plain weights, and modules."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import switchgear
from switchgear import compress, reference_panels
from switchgear.panels import DTYPES, PanelMatrix, in_panels, panel_layout
from switchgear.reference_panels import PanelLayout
from switchgear.stored import stored_moe, stored_of

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


def make_large() -> switchgear.Experts:
    """Of which compact weights save something."""
    experts = switchgear.Experts(512, 384, 2, dtype=torch.bfloat16)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
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
    """The generic kernels have 4 lanes of float32 and panels of 8 rows, 2 vectors side by side, which are one group."""
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
    """All kinds of tiles, experts beyond the rows of a product, rows of one, two and three chunks."""
    options = {"gated": kind != "plain", "interleaved": kind == "interleaved"}
    for hidden_size, intermediate_size in ((128, 192), (2240, 64), (64, 1088)):
        gate_up = torch.randn(E, intermediate_size * (2 if options["gated"] else 1), hidden_size).to(dtype)
        down = torch.randn(E, hidden_size, intermediate_size).to(dtype) / 8
        stored = in_panels(gate_up), in_panels(down)
        for num_tokens in (0, 1, 3, 16, 45, 700 if hidden_size == 128 else 24):
            x = torch.randn(num_tokens, hidden_size).to(dtype)
            ids = torch.rand(num_tokens, E).argsort(-1)[:, :K].int()
            ids[::3, 0] = -1
            weights = torch.rand(num_tokens, K)
            y = switchgear.moe(x, gate_up, down, ids, weights, **options)
            assert same_bits(stored_moe(x, *stored, ids, weights, **options), y), (hidden_size, num_tokens)


@dtypes
def test_infinities_and_nan(isa: str, dtype: torch.dtype) -> None:
    experts = make_experts(dtype=dtype)
    with torch.no_grad():
        experts.gate_up_proj[0, 0, 0], experts.gate_up_proj[1, 3, 5] = float("inf"), float("nan")
        call = inputs(40, dtype)
        y, got = experts(*call), copy.deepcopy(experts).pack_(panels=True)(*call)
    assert y.isnan().any()
    assert torch.equal(got.isnan(), y.isnan())
    assert torch.equal(got.nan_to_num(), y.nan_to_num())


# ---- modules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {}, {"bias": True}, {"gated": False}, {"interleaved": True}, {"transposed": True}, {"dtype": torch.float32},
        {"dtype": torch.float16},
    ],
    ids=lambda options: "-".join(options) or "gated",
)  # fmt: skip
def test_experts(backend: str, options: dict[str, Any]) -> None:
    if backend.startswith(("simt", "cuda")):
        pytest.skip("panels are for the CPU, and weights on other devices stay as they are")
    experts = make_experts(**options)
    packed = copy.deepcopy(experts).pack_(panels=True)
    assert "panels" in repr(packed)
    assert [name for name, _ in packed.named_parameters()] == [n for n, _ in experts.named_parameters() if "bias" in n]
    for num_tokens in (0, 1, 20):
        call = inputs(num_tokens, experts.down_proj.dtype)
        with torch.no_grad():
            assert torch.equal(packed(*call), experts(*call))
        shaped = call[0].view(num_tokens, 1, H), call[1].view(num_tokens, 1, K), call[2].view(num_tokens, 1, K)
        with torch.no_grad():
            assert torch.equal(packed(*shaped), experts(*call).view(num_tokens, 1, H))
    before = dict(experts.named_parameters())
    assert stored_of(packed.unpack_()) is None
    assert [name for name, _ in packed.named_parameters()] == list(before)
    assert all(torch.equal(weight, before[name]) for name, weight in packed.named_parameters())


def test_gradients_reach_activations() -> None:
    experts = make_experts(bias=True)
    results = []
    for module in (experts, copy.deepcopy(experts).pack_(panels=True)):
        torch.manual_seed(0)
        x, ids, weights = inputs(9)
        leaves = [x.requires_grad_(), weights.requires_grad_(), module.gate_up_proj_bias, module.down_proj_bias]
        results.append(torch.autograd.grad(module(x, ids, weights).square().sum(), leaves))
    assert all(map(torch.equal, *results))


def test_state_dict_is_plain(tmp_path: Path) -> None:
    experts = make_experts(bias=True, transposed=True)
    model = nn.Sequential(copy.deepcopy(experts))
    assert switchgear.pack_panels(model) == 1
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    assert sorted(state) == sorted(f"0.{name}" for name in experts.state_dict())
    assert all(torch.equal(state[f"0.{name}"], weight) for name, weight in experts.state_dict().items())

    other = nn.Sequential(make_experts(bias=True, transposed=True))
    assert switchgear.pack_panels(other) == 1
    other.load_state_dict(state)
    call = inputs(4)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        y = experts(*call)
        for module in (model, other, *copies):
            assert torch.equal(module[0](*call), y)
    for module in copies:
        assert switchgear.unpack_panels(module) == 1
    bad = {name: weight + 1 for name, weight in state.items()}
    bad["0.down_proj"] = bad["0.down_proj"][:, :-1]
    with pytest.raises(ValueError, match=r"0.down_proj: expected shape"):  # and nothing was loaded of the others
        other.load_state_dict(bad)
    with torch.no_grad():
        assert torch.equal(other[0].gate_up_proj_panels, model[0].gate_up_proj_panels)
    state["0.gate_up_proj"] = state["0.gate_up_proj"][:, :-1]
    with pytest.raises(ValueError, match=r"0.gate_up_proj: expected shape \[5, 128, 384\], got \[5, 127, 384\]"):
        other.load_state_dict(state)


def test_autocast_and_other_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = make_experts()
    packed = copy.deepcopy(experts).pack_(panels=True)
    x, ids, weights = inputs(5, torch.float32)
    with pytest.raises(TypeError, match="gate_up_proj: expected"):
        packed(x, ids, weights)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = experts(x, ids, weights)
        low = make_experts(dtype=torch.float32)
        assert torch.equal(copy.deepcopy(low).pack_(panels=True)(x, ids, weights), low(x, ids, weights))
        monkeypatch.setattr(PanelMatrix, "weight", None)  # panels of its dtype are read as they are
        assert torch.equal(packed(x, ids, weights), y)


def test_another_isa(isa: str) -> None:
    """Panels of one ISA on another: in one process, or loaded on another machine."""
    experts = make_experts()
    packed = copy.deepcopy(experts).pack_(panels=True)
    call = inputs(5)
    for other in switchgear.available_cpu_isas():
        switchgear.set_cpu_isa(other)
        with torch.no_grad():
            assert torch.equal(packed(*call), experts(*call))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str) -> None:
    packed = make_experts().pack_(panels=True)
    call = inputs(7)
    compiled = torch.compile(packed, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert torch.equal(compiled(*call), packed(*call))


def test_op() -> None:
    experts = make_experts()
    x, ids, weights = inputs(6)
    first, second = in_panels(experts.gate_up_proj), in_panels(experts.down_proj)
    for save_h in (False, True):
        args = (x, first.data, second.data, None, None, ids, weights, "silu", True, False, 1.702, 0.0, save_h)
        torch.library.opcheck(torch.ops.switchgear.moe_forward.default, args)
        plain = (x, experts.gate_up_proj.detach(), experts.down_proj.detach(), *args[3:])
        with switchgear.use_backend("reference"):
            expected = torch.ops.switchgear.moe_forward(*plain)
            assert all(map(torch.equal, torch.ops.switchgear.moe_forward(*args), expected))


def test_with_adapters() -> None:
    experts = make_experts()
    adapters = compress.add_lora(experts, 4)
    call = inputs(6)
    y = experts(*call)
    switchgear.pack_panels(experts)
    torch.testing.assert_close(experts(*call), y)
    experts(*call).sum().backward()
    assert all(adapter.grad is not None for adapter in adapters)
    switchgear.unpack_panels(experts)
    assert not experts.down_proj.requires_grad


def test_errors() -> None:
    rows = panel_layout(torch.bfloat16).rows
    for model, reason in (
        (nn.Linear(2, 2), "Linear has no experts that run on the fused kernel"),
        (make_experts(dtype=torch.float64), "gate_up_proj is torch.float64, not torch.float32"),
        (make_experts(device="meta"), "gate_up_proj is on meta, and weights in panels are for the CPU"),
        (switchgear.Experts(H, 66, 2, dtype=torch.bfloat16), f"gate_up_proj has 132 rows, no multiple of {2 * rows}"),
        (switchgear.Experts(72, I, 2, dtype=torch.bfloat16), "gate_up_proj has 72 columns, no multiple of 32"),
        (make_large().pack_(compact=True), "gate_up_proj is stored as compact weights"),
    ):
        expected = f"model: expected experts that can be stored as weights in panels; {reason}"
        with pytest.raises(ValueError, match=expected):
            switchgear.pack_panels(model)
        assert switchgear.unpack_panels(model) == 0
    with pytest.raises(ValueError, match="panels: expected either panels or compact, got both"):
        make_experts().pack_(panels=True, compact=True)

    packed = make_experts().pack_(panels=True)
    assert switchgear.pack_panels(packed) == 1
    with pytest.raises(ValueError, match="gate_up_proj is stored as weights in panels"):
        compress.compact(make_large().pack_(panels=True))
    with pytest.raises(ValueError, match="expected plain weights, got weights in panels; take that back first"):
        compress.quantize(packed, "int8")
    x, ids, weights = inputs(3)
    with pytest.raises(ValueError, match=r"x: expected shape \[..., 128\], got \[3, 127\]"):
        packed(x[:, :-1], ids, weights)
    first, second = (matrix.data for matrix in stored_of(packed).matrices(packed))  # type: ignore[union-attr]
    call = ids, weights, "silu", True, False, 1.702, 0.0, False
    with pytest.raises(ValueError, match="down_proj: expected shape"):
        torch.ops.switchgear.moe_forward(x, first, second[:, :, :-1].contiguous(), None, None, *call)
    with pytest.raises(ValueError, match=r"weight: expected 2 dimensions, got shape \[5, "):
        switchgear.grouped_gemm(x, first, switchgear.plan(ids, E).expert_offsets)


def test_a_model_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, pad_token_id=0, eos_token_id=None,
        bos_token_id=None,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    switchgear.accelerate(model)
    prompt = torch.arange(1, 9)[None]
    logits, before = model(prompt).logits, {name: w.clone() for name, w in model.state_dict().items()}
    text = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert switchgear.pack_panels(model) == 2
    assert torch.equal(model(prompt).logits, logits)
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), text)
    model.save_pretrained(tmp_path)
    loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], w) for name, w in before.items())
    assert switchgear.unpack_panels(model) == 2
    assert torch.equal(model(prompt).logits, logits)
