# SPDX-License-Identifier: BSD-3-Clause
"""Compositions against plain float64 loops: outputs, and gradients of the input and of every parameter."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import switchgear
from errors import raises
from flops import count_flops
from loops import assert_agrees, best, expert, mixture
from switchgear import presets
from switchgear.experts import Experts
from switchgear.layers import (
    CartesianMoE,
    GatedSharedExperts,
    HeterogeneousExperts,
    MergedExperts,
    Monet,
    MonetExperts,
    MonetRouter,
    MultiHeadMoE,
    SoftMoE,
    Stitched,
    StitchLayer,
    StratifiedMoE,
    VirtualExperts,
    per_conv_tokens,
    with_virtual,
)
from switchgear.routing import Capacity, ExpertChoice, FromEmbedding, Lookup

H = 16


def moe(**changes: object) -> switchgear.MoE:
    options = {"hidden_size": H, "intermediate_size": 12, "num_experts": 6, "top_k": 2, **changes}
    return switchgear.MoE(**options)


def moe_loop(layer: switchgear.MoE, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    p = (rows @ layer.gate.weight.T).softmax(-1)
    weights, ids = p.topk(layer.gate.top_k)
    return mixture(layer.experts, rows, ids, weights).view(x.shape)


# ---- multi-head ------------------------------------------------------------------------------------------------------


def test_row28_multi_head_moe_is_a_loop_over_pieces(backend: str) -> None:
    layer = MultiHeadMoE(moe(hidden_size=H // 4), H, heads=4)

    def loop(layer: MultiHeadMoE, x: Tensor) -> Tensor:
        pieces = (x @ layer.head_proj.weight.T).chunk(4, -1)
        outputs = [moe_loop(layer.moe, piece) for piece in pieces]
        return torch.cat(outputs, -1) @ layer.merge_proj.weight.T

    assert_agrees(layer, loop, torch.randn(2, 5, H))


def test_row28_multi_head_moe_keeps_pieces_of_a_sequence_together() -> None:
    """Policies per sequence see the pieces of a whole sequence, and the context of a token applies to its pieces."""
    select = ExpertChoice(1.0, scope="sequence")
    layer = MultiHeadMoE(moe(hidden_size=H // 4, num_experts=4, top_k=None, select=select), H, heads=4)
    seen = []
    layer.moe.gate.register_forward_hook(lambda module, args, output: seen.append(output.topk_ids))
    x = torch.randn(2, 6, H)
    layer(x)
    for ids in seen[0].view(2, -1):
        assert [int((ids == e).sum()) for e in range(4)] == [6] * 4  # of 24 pieces
    layer(x, sequence_ids=torch.tensor([[0] * 6, [1] * 6]))
    layer(x, sequence_length=6)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    lookup = MultiHeadMoE(moe(hidden_size=H // 4, top_k=None, select=Lookup(torch.arange(6))), H, heads=4)
    lookup.moe.gate.register_forward_hook(lambda module, args, output: seen.append(output.topk_ids))
    lookup(x, token_ids=torch.arange(12).view(2, 6) % 6)
    assert seen[3].flatten().tolist() == [t % 6 for t in range(12) for _ in range(4)]
    task = partial(FromEmbedding, dim=3)
    by_task = MultiHeadMoE(moe(hidden_size=H // 4, top_k=1, score=task), H, heads=4)
    by_task.moe.gate.register_forward_hook(lambda module, args, output: seen.append(output.topk_ids))
    rows, ids = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 1])
    by_task(x[0], embedding=rows)  # of the tokens
    by_task(x[0], embedding=rows[:2], sequence_ids=ids)  # of the sequences
    wanted = (rows @ by_task.moe.gate.score.linear.weight.T + by_task.moe.gate.score.linear.bias).argmax(-1)
    assert torch.equal(seen[4].view(6, 4), wanted[:, None].expand(6, 4).int())
    assert torch.equal(seen[5].view(6, 4), wanted[ids][:, None].expand(6, 4).int())
    assert layer(torch.randn(5, H), sequence_length=5).shape == (5, H)
    assert lookup(torch.randn(0, H), token_ids=torch.zeros(0, dtype=torch.int64)).shape == (0, H)


def test_row28_multi_head_moe_with_one_head_is_the_layer() -> None:
    inner = moe()
    layer = MultiHeadMoE(inner, H, heads=1)
    with torch.no_grad():
        layer.head_proj.weight.copy_(torch.eye(H))
        layer.merge_proj.weight.copy_(torch.eye(H))
    x = torch.randn(7, H)
    torch.testing.assert_close(layer(x), inner(x))
    with raises(ValueError):
        MultiHeadMoE(inner, H, heads=3)


@pytest.mark.parametrize(("heads", "top_k"), [(2, 2), (4, 1), (4, 3)])
def test_row28_multi_head_moe_has_the_flops_of_the_layer_without_heads(heads: int, top_k: int) -> None:
    """The projections' 4·H² operations per token equal those of 2·H/(3·K) of the I columns of K gated experts. Without
    these columns, forward and training cost the same, counted product by product; experts get h times the rows."""
    hidden, width = 72, 60
    shrunk = width - 2 * hidden // (3 * top_k)
    plain = moe(hidden_size=hidden, intermediate_size=width, top_k=top_k)
    inner = moe(hidden_size=hidden // heads, intermediate_size=shrunk, top_k=top_k)
    layer = MultiHeadMoE(inner, hidden, heads)
    x = torch.randn(30, hidden, requires_grad=True)
    wanted = 30 * (2 * hidden * 6 + top_k * 6 * hidden * width)  # router and three projections
    for module in (plain, layer):
        assert count_flops(lambda module=module: module(x)) == wanted
        assert count_flops(lambda module=module: module(x).sum().backward()) == 3 * wanted
    wide = MultiHeadMoE(moe(hidden_size=hidden // heads, intermediate_size=width, top_k=top_k), hidden, heads)
    assert count_flops(lambda: wide(x)) == wanted + 30 * 4 * hidden**2


def test_row28_multi_head_moe_gradients() -> None:
    layer = MultiHeadMoE(moe(hidden_size=H // 4), H, heads=4).double()
    assert torch.autograd.gradcheck(layer, (torch.randn(3, H, dtype=torch.float64, requires_grad=True),))


# ---- Cartesian -------------------------------------------------------------------------------------------------------


def test_row27_cartesian_moe_is_two_layers(backend: str) -> None:
    layer = CartesianMoE(moe(), moe(num_experts=4), H)

    def loop(layer: CartesianMoE, x: Tensor) -> Tensor:
        inner = x + moe_loop(layer.first, x)
        return moe_loop(layer.second, F.layer_norm(inner, (H,), layer.norm.weight, layer.norm.bias))

    assert_agrees(layer, loop, torch.randn(9, H))


def test_row27_cartesian_moe_grows_with_the_sum() -> None:
    def size(a: int, b: int) -> int:
        return sum(p.numel() for p in CartesianMoE(moe(num_experts=a), moe(num_experts=b), H).parameters())

    each = sum(p[0].numel() for p in moe().experts.parameters()) + H  # an expert and its row of the router
    assert size(8, 8) - size(4, 8) == size(8, 8) - size(8, 4) == 4 * each


def test_row27_cartesian_moe_without_a_first_expert_changes_its_tokens_alone() -> None:
    layer, x = CartesianMoE(moe(return_routing=False), moe(), H).eval(), torch.randn(40, H)
    seen = []
    layer.first.gate.register_forward_hook(lambda module, args, output: seen.append(output.topk_ids))
    before = layer(x)
    with torch.no_grad():
        layer.first.experts.down_proj[3].zero_()
    after = layer(x)
    uses = (seen[0] == 3).any(1)
    assert 0 < uses.sum() < len(x)
    assert torch.equal(before[~uses], after[~uses])
    assert (before[uses] != after[uses]).any(1).all()


# ---- Soft MoE --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
def test_row31_soft_moe_is_the_published_formula(backend: str, normalize: bool) -> None:
    layer = SoftMoE(Experts(H, 12, 5), slots=3, normalize=normalize)

    def loop(layer: SoftMoE, x: Tensor) -> Tensor:
        outputs = []
        for sequence in x:
            phi, rows = layer.phi, sequence
            if normalize:
                rows = sequence / sequence.norm(dim=-1, keepdim=True)
                phi = layer.scale * phi / phi.norm(dim=-1, keepdim=True)
            logits = rows @ phi.T
            dispatch, combine = logits.exp() / logits.exp().sum(0), logits.exp() / logits.exp().sum(1, keepdim=True)
            torch.testing.assert_close(dispatch.sum(0), torch.ones_like(dispatch[0]))
            torch.testing.assert_close(combine.sum(1), torch.ones_like(combine[:, 0]))
            slots = dispatch.T @ sequence
            outputs.append(combine @ torch.stack([expert(layer.experts, s // 3, slot) for s, slot in enumerate(slots)]))
        return torch.stack(outputs)

    assert_agrees(layer, loop, torch.randn(2, 7, H))


def test_row31_soft_moe_of_the_preset_has_plain_logits() -> None:
    layer, x = presets.build(H, 12, 4, **presets.soft_moe()).double(), torch.randn(5, H).double()
    assert layer.slots == 1
    torch.testing.assert_close(layer.logits(x), x @ layer.phi.T)


def test_row31_soft_moe_permutes_with_its_tokens_and_skips_padding() -> None:
    layer, x, order = SoftMoE(Experts(H, 12, 1)), torch.randn(9, H), torch.randperm(9)
    torch.testing.assert_close(layer(x[order]), layer(x)[order])
    mask = torch.tensor([True] * 6 + [False] * 3)
    y = layer(x, mask)
    torch.testing.assert_close(y[:6], layer(x[:6]))
    assert not y[6:].any()
    assert not layer(x, torch.zeros(9, dtype=torch.bool)).any()


def test_row31_soft_moe_loads_a_scalar() -> None:
    """The scale had no dimension once."""
    layer, other = (SoftMoE(Experts(H, 12, 4)) for _ in range(2))
    state = {**other.state_dict(), "scale": torch.tensor(3.0)}
    layer.load_state_dict(state)
    assert layer.scale.tolist() == [3.0]
    assert state["scale"].shape == ()


def test_row31_soft_moe_ignores_what_padding_holds() -> None:
    layer, x, mask = SoftMoE(Experts(H, 12, 4)), torch.randn(2, 5, H), torch.ones(2, 5, dtype=torch.bool)
    mask[:, 3:] = False
    wanted = layer(x, mask)
    x[:, 3:] = torch.nan
    assert torch.equal(layer(x, mask), wanted)


def test_layers_of_layers_refuse_those_that_return_the_routing() -> None:
    layer, other = moe(return_routing=True), moe()
    with raises(ValueError, "moe"):
        MultiHeadMoE(layer, 2 * H, 2)
    for name, pair in {"first": (layer, other), "second": (other, layer)}.items():
        with raises(ValueError, name):
            CartesianMoE(*pair, H)


def test_row31_soft_moe_weights_sum_to_one() -> None:
    """If tokens are equal, every slot is that token: its dispatch sums to 1. If experts are equal too, every token gets
    their output: its combination sums to 1."""
    layer = SoftMoE(Experts(H, 12, 5), slots=3)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    token = torch.randn(H)
    torch.testing.assert_close(layer(token.expand(7, H)), expert(layer.experts, 0, token).expand(7, H))


def test_row31_soft_moe_makes_tokens_of_a_feature_map() -> None:
    features = torch.arange(2 * 3 * 2 * 2).view(2, 3, 2, 2)
    tokens = per_conv_tokens(features)
    assert tokens.shape == (2, 4, 3)
    assert torch.equal(tokens[1, 2], features[1, :, 1, 0])


# ---- strata ----------------------------------------------------------------------------------------------------------


def strata_loop(layer: StratifiedMoE, x: Tensor, passes: list[list[int]] | None = None) -> Tensor:
    stratum_of = [s for s, count in enumerate(layer.strata) for _ in range(count)]
    rows = []
    for row in x:
        stratum, visited = 0, []
        while stratum < len(layer.strata):
            first = layer.first_expert[stratum]
            normed = F.layer_norm(row, (H,), layer.norms[stratum].weight, layer.norms[stratum].bias)
            weights, ids = (normed @ layer.gates[stratum].T).softmax(-1).topk(layer.top_k)
            row = row + sum(
                w * expert(layer.experts, first + int(e), normed) for w, e in zip(weights, ids, strict=True)
            )
            stratum = stratum_of[first + int(ids[0])] + 1
            visited.append(stratum - 1)
        rows.append(row)
        if passes is not None:
            passes.append(visited)
    return torch.stack(rows)


def test_row29_stratified_moe_is_a_walk(backend: str) -> None:
    layer = StratifiedMoE(H, 12, [2, 2, 3], top_k=2)
    assert_agrees(layer, strata_loop, torch.randn(25, H), length=3 * 256)  # three passes, each through norm and layer
    assert 0 < layer.losses["stratified"] < 0.2


@pytest.mark.parametrize("training", [False, True])
def test_vmap_of_stratified_layers(training: bool) -> None:
    layer, x = StratifiedMoE(H, 12, [2, 3]).train(training), torch.randn(3, 5, H)
    assert torch.equal(torch.func.vmap(layer)(x), torch.stack([layer(rows) for rows in x]))


def test_row29_stratified_moe_sends_every_token_through_the_last_stratum() -> None:
    layer, passes = StratifiedMoE(H, 12, [2, 2, 3]), []
    strata_loop(layer, torch.randn(60, H), passes)
    assert all(visited[-1] == 2 and visited.count(2) == 1 and len(visited) <= 3 for visited in passes)
    assert len({len(visited) for visited in passes}) == 3


def test_row29_stratified_is_a_walk_of_two_relu_experts_with_a_capacity(backend: str) -> None:
    """A pass of T_i tokens at a gate that sees E_i experts gives each at most ⌈2 · T_i / E_i⌉, first choices first."""
    torch.manual_seed(1)
    layer, x = presets.build(H, 12, 8, **presets.stratified(balance=0.0)), 2 * torch.randn(30, H)
    dropped = 0

    def loop(layer: StratifiedMoE, x: Tensor) -> Tensor:
        nonlocal dropped
        rows, position, stratum_of = list(x), [0] * len(x), [0, 0, 1, 1, 2, 2, 2, 2]
        for stratum, first in enumerate((0, 2, 4)):
            here = [t for t in range(len(x)) if position[t] == stratum]
            norm, visible = layer.norms[stratum], 8 - first
            normed = {t: F.layer_norm(rows[t], (H,), norm.weight, norm.bias) for t in here}
            p = {t: (normed[t] @ layer.gates[stratum].T).softmax(-1) for t in here}
            ids = {t: best(p[t], 2) for t in here}
            free = [-(-2 * len(here) // visible)] * visible
            for choice in (0, 1):
                for t in here:
                    e = ids[t][choice]
                    free[e] -= 1
                    dropped += free[e] < 0
                    if free[e] >= 0:
                        rows[t] = rows[t] + p[t][e] * expert(layer.experts, first + e, normed[t])
            for t in here:
                position[t] = stratum_of[first + ids[t][0]] + 1
        assert position == [3] * len(x)
        return torch.stack(rows)

    assert_agrees(layer, loop, x, length=3 * 256)
    assert dropped
    with raises(TypeError, "capacity"):
        StratifiedMoE(H, 12, [2, 2], capacity=1.25)


def test_row29_sequences_do_not_compete_with_a_capacity_of_their_own() -> None:
    layer = StratifiedMoE(H, 12, [2, 2, 4], top_k=2, capacity=Capacity(1.0, scope="sequence"))
    x = torch.randn(3, 16, H)
    y = layer(x)
    torch.testing.assert_close(y[1:], layer(x[1:]))
    layer.capacity = None
    assert not torch.equal(y, layer(x))  # something was dropped


def test_row29_stratified_moe_of_one_stratum_is_norm_and_layer_and_residual() -> None:
    layer, inner, x = StratifiedMoE(H, 12, [6], top_k=2, aux_loss=1.0), moe(return_routing=True), torch.randn(11, H)
    inner.experts.load_state_dict(layer.experts.state_dict())
    with torch.no_grad():
        inner.gate.weight.copy_(layer.gates[0])
    y, routing = inner(layer.norms[0](x))
    assert torch.equal(layer(x), x + y)
    wanted = switchgear.load_balancing_loss(routing.router_logits, routing.topk_ids[:, :1])
    torch.testing.assert_close(layer.losses["stratified"], wanted)


# ---- widths ----------------------------------------------------------------------------------------------------------

WIDTHS = [4, 12, 8, 20]


@pytest.mark.parametrize("options", [{}, {"transposed": True}, {"interleaved": True}, {"gated": False}], ids=str)
def test_row9_hmoe_is_a_loop_of_linear_layers_of_different_widths(backend: str, options: dict[str, bool]) -> None:
    experts = HeterogeneousExperts(H, WIDTHS, activation="relu" if "gated" in options else "silu", **options)
    ids = torch.tensor([[0, 1], [3, 2], [2, -1], [-1, -1], [1, 3]], dtype=torch.int32)
    weights = torch.rand(5, 2)

    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = experts

        def forward(self, x: Tensor) -> Tensor:
            return self.experts(x, ids, weights)

    def loop(module: Bound, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for t, choice in enumerate(ids.tolist()):
            for k, e in enumerate(choice):
                if e < 0:
                    continue
                gate_up, down = module.experts.weights_of(e)
                assert down.shape == (H, WIDTHS[e])
                h = x[t] @ gate_up.T
                a = h.relu() if "gated" in options else F.silu(h[: WIDTHS[e]]) * h[WIDTHS[e] :]
                y = y.index_add(0, torch.tensor([t]), weights[t, k].double() * (a @ down.T)[None])
        return y

    assert_agrees(Bound(), loop, torch.randn(5, H))


def test_row9_hmoe_costs_no_padding() -> None:
    experts = HeterogeneousExperts(H, WIDTHS)
    ids = torch.tensor([[0, 1], [3, 2], [2, -1]])
    rows = (experts.slice_ids(ids) >= 0).sum() * experts.unit
    assert rows == sum(WIDTHS[e] for e in ids.flatten().tolist() if e >= 0)
    assert sum(p.numel() for p in experts.parameters()) == 3 * H * sum(WIDTHS)


@pytest.mark.parametrize("is_parent_first", [True, False])
def test_row9_hmoe_is_reset_module_by_module(is_parent_first: bool) -> None:
    """As after construction on the meta device: down_proj within ±1/√I_e of its expert, in either order."""
    layer = switchgear.MoE(64, 48, 2, 2, widths=[1, 2])
    experts = layer.experts
    for module in list(layer.modules())[:: 1 if is_parent_first else -1]:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for number, width in enumerate(experts.intermediate_sizes):
        largest = experts.weights_of(number)[1].abs().max().item()
        assert 0.95 < largest * width**0.5 <= 1


def test_row9_hmoe_of_equal_widths_is_experts_bit_for_bit(backend: str) -> None:
    equal, plain = HeterogeneousExperts(H, [12] * 6), Experts(H, 12, 6)
    plain.load_state_dict(equal.slices.state_dict())
    routing = switchgear.route(torch.randn(9, 6), 2)
    x = torch.randn(9, H)
    assert torch.equal(equal(x, *routing[:2]), plain(x, *routing[:2]))


def test_row9_hmoe_widths_and_units() -> None:
    assert HeterogeneousExperts(H, WIDTHS).unit == 4
    with raises(ValueError):
        HeterogeneousExperts(H, WIDTHS, unit=8)
    with raises(ValueError, "intermediate_sizes"):
        HeterogeneousExperts(H, [])


# ---- virtual experts -------------------------------------------------------------------------------------------------


def test_row8_adamoe_and_moe_plus_plus_are_a_loop(backend: str) -> None:
    experts = with_virtual(Experts(H, 12, 4), null=2, copy=2, constant=3)
    nn.init.normal_(experts.constants)
    ids = torch.stack([torch.randperm(11)[:5] for _ in range(30)]).int()
    ids[7] = torch.tensor([4, 5, -1, -1, -1])  # only nulls
    weights = torch.rand(30, 5)

    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = experts

        def forward(self, x: Tensor) -> Tensor:
            return self.experts(x, ids, weights.to(x.dtype))

    def loop(module: Bound, x: Tensor) -> Tensor:
        layer, rows = module.experts, []
        for row, choice, weight in zip(x, ids.tolist(), weights.double(), strict=True):
            kept = [k for k, e in enumerate(choice) if e >= 0 and e not in (4, 5)]
            total = sum(weight[k] for k in kept)
            y = 0 * row
            for k in kept:
                e = choice[k]
                output = expert(layer.experts, e, row) if e < 4 else row if e < 8 else layer.constants[e - 8]
                y = y + weight[k] / total * output
            rows.append(y)
        return torch.stack(rows)

    assert_agrees(Bound(), loop, torch.randn(30, H))
    assert not experts(torch.randn(30, H), ids, weights)[7].any()


def test_row8_adamoe_without_null_experts_changes_nothing() -> None:
    plain, x, routing = Experts(H, 12, 4), torch.randn(9, H), switchgear.route(torch.randn(9, 4), 2)
    assert torch.equal(with_virtual(plain)(x, *routing[:2]), plain(x, *routing[:2]))
    assert VirtualExperts(plain, null=3).num_experts == 7


def test_row8_adamoe_leaves_k_e_over_e_plus_m_true_experts() -> None:
    routing = switchgear.route(torch.randn(20_000, 24), 4)
    true = (routing.topk_ids < 16).sum(1).float().mean()
    assert true.item() == pytest.approx(4 * 16 / 24, rel=0.01)


# ---- shared experts behind a gate ------------------------------------------------------------------------------------


def test_qwen2_moe_gates_its_shared_experts() -> None:
    layer, x = GatedSharedExperts(H, 12), torch.randn(5, H)
    torch.testing.assert_close(layer(x), layer.experts(x) * (x @ layer.gate.weight.T).sigmoid())
    whole = moe()
    whole.shared_experts = layer
    torch.testing.assert_close(whole(x) - layer(x), moe_loop(whole, x))


# ---- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_row49_meo_is_one_average_expert(backend: str, pooling: str) -> None:
    layer = MergedExperts(switchgear.Router(H, 6, 3), Experts(H, 12, 6), pooling=pooling)
    if pooling == "attention":
        nn.init.normal_(layer.attention.weight)

    def loop(layer: MergedExperts, x: Tensor) -> Tensor:  # a router without normalize=: see test_papers_merged.py
        outputs = []
        for sequence in x:
            share = torch.full((len(sequence), 1), 1 / len(sequence), dtype=x.dtype)
            if pooling == "attention":
                share = (sequence @ layer.attention.weight.T).softmax(0)
            weights, ids = ((share * sequence).sum(0) @ layer.router.weight.T).softmax(-1).topk(3)
            gate_up = sum(w * layer.experts.gate_up_proj[e] for w, e in zip(weights, ids, strict=True))
            down = sum(w * layer.experts.down_proj[e] for w, e in zip(weights, ids, strict=True))
            gate, up = (sequence @ gate_up.T).chunk(2, -1)
            outputs.append((F.silu(gate) * up) @ down.T)
        return torch.stack(outputs)

    assert_agrees(layer, loop, torch.randn(3, 5, H))


def test_row49_meo_of_linear_experts_is_their_mixture() -> None:
    """relu with a large positive bias is the identity, so the experts are affine."""
    experts = Experts(H, 12, 4, activation="relu", gated=False, bias=True)
    router = switchgear.Router(H, 4, 4)  # normalised over all four
    nn.init.zeros_(experts.down_proj_bias)
    with torch.no_grad():
        experts.up_proj_bias.fill_(1e3)
        experts.down_proj.copy_(experts.down_proj[:1].expand(4, -1, -1))  # linear in what differs
    layer, x = MergedExperts(router, experts), torch.randn(2, 5, H)
    routing = router(x.mean(1))
    each = routing.topk_ids.repeat_interleave(5, 0), routing.topk_weights.repeat_interleave(5, 0)
    torch.testing.assert_close(layer(x), experts(x.view(-1, H), *each).view(x.shape), rtol=1e-3, atol=1e-2)


def test_row49_meo_of_one_expert_carries_the_weight_inside() -> None:
    layer, x = MergedExperts(switchgear.Router(H, 6, 1), Experts(H, 12, 6)), torch.randn(2, 5, H)
    routing = layer.router(x.mean(1))
    for b in range(2):
        weight, e = routing.topk_weights[b, 0], int(routing.topk_ids[b, 0])
        gate, up = (weight * (x[b] @ layer.experts.gate_up_proj[e].T)).chunk(2, -1)
        torch.testing.assert_close(layer(x)[b], weight * (F.silu(gate) * up) @ layer.experts.down_proj[e].T)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_row49_meo_costs_one_network_and_the_merge(top_k: int) -> None:
    """For B sequences of L tokens: one gated network over L tokens and an average of K experts' weights each, and a
    router that sees one row; the mixture costs K networks. K = 4 costs less than half from L = 4 on, here 33 / 98."""
    batch, length = 3, 32
    layer = MergedExperts(switchgear.Router(H, 6, top_k), Experts(H, 12, 6))
    x, weights = torch.randn(batch, length, H), 3 * H * 12
    network, merge, router = 2 * batch * length * weights, 2 * batch * top_k * weights, 2 * batch * H * 6
    with torch.no_grad():
        merged = count_flops(lambda: layer(x))
        mixture_of_experts = count_flops(lambda: moe(top_k=top_k)(x))
    assert merged == network + merge + router
    assert mixture_of_experts == top_k * network + length * router
    assert top_k == 1 or merged < 0.6 * mixture_of_experts


def test_row49_meo_merges_each_task_once() -> None:
    layer, x = MergedExperts(switchgear.Router(H, 6, 2), Experts(H, 12, 6)), torch.randn(10, H)
    tasks = torch.tensor([0, 2, 0, 2, 2, 0, 2, 0, 0, 2])  # task 1 has no tokens
    y = layer(x, tasks, 3)
    for task in (0, 2):
        torch.testing.assert_close(y[tasks == task], layer(x[None, tasks == task])[0])
    with raises(ValueError, "hidden_states"):
        layer(x)


# ---- Monet -----------------------------------------------------------------------------------------------------------


def monet_loop(layer: Monet, x: Tensor, disabled: tuple[tuple[int, int], ...] = ()) -> Tensor:
    first, second = layer.router(x)
    experts, n = layer.experts, layer.experts.sqrt_n
    y = torch.zeros_like(x)
    for i in range(n):
        for j in range(n):
            if (i, j) in disabled:
                continue
            g = (first[:, :, i] * second[:, :, j]).sum(1, keepdim=True)
            if experts.mode == "horizontal":
                a = (x @ experts.up[i].T + experts.up_bias[i]).relu().square()
                out = a @ experts.down[j] + experts.down_bias[j]
            else:
                a1 = x @ experts.up1[i].T + experts.up_bias1[i]
                a = torch.cat((a1, x @ experts.up2[j].T + experts.up_bias2[j]), -1).relu().square()
                upper, lower = (
                    a @ experts.down1[i] + experts.down_bias1[i],
                    a @ experts.down2[j] + experts.down_bias2[j],
                )
                out = torch.cat((upper, lower), -1)
            y = y + g * out
    return y


@pytest.mark.parametrize("mode", ["horizontal", "vertical"])
def test_row30_monet_is_the_sum_over_all_experts(mode: str) -> None:
    layer = Monet(H, 4, 6, heads=3, top_k=1, mode=mode)
    for name, parameter in layer.experts.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    assert_agrees(layer, monet_loop, torch.randn(10, H))


@pytest.mark.parametrize("mode", ["horizontal", "vertical"])
def test_row30_a_disabled_monet_expert_takes_exactly_its_term_away(mode: str) -> None:
    layer, x = Monet(H, 4, 6, heads=3, top_k=1, mode=mode).double().eval(), torch.randn(10, H).double()
    for name, parameter in layer.experts.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    pairs = ((0, 1), (2, 1), (2, 3))
    layer.experts.disable(torch.tensor(pairs))
    wanted = monet_loop(layer, x, pairs)
    torch.testing.assert_close(
        layer(x),
        wanted,
    )
    assert not torch.allclose(wanted, monet_loop(layer, x))
    with raises(ValueError):
        layer.experts.disable(torch.tensor([[0, 4]]))


def test_row30_monet_parameters_grow_with_the_root_of_the_experts() -> None:
    sizes = [sum(p.numel() for p in MonetExperts(H, n, 4, device="meta").parameters()) for n in (64, 128, 512)]
    assert sizes == [sizes[0], 2 * sizes[0], 8 * sizes[0]]


def test_row30_monet_gates_are_softmaxes_of_what_exceeds_a_quantile() -> None:
    """The threshold applies to logits normalised per head; the softmax is of the original logits."""
    router, x = MonetRouter(H, 16, 2, top_k=3).double(), torch.randn(40, H).double()
    trained = router(x)
    evaluated = router.eval()(x)  # by the statistics of training
    threshold = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - 3 / 16)).double()
    for g in range(2):
        for h in range(2):
            z = x @ router.weight.view(2, 2, 16, H)[g, h].T
            running = (router.running_mean[2 * g + h].double(), router.running_var[2 * g + h].double())
            for gates, (mean, var) in ((trained, (z.mean(), z.var(correction=0))), (evaluated, running)):
                normal = (z - mean) / (var + 1e-5).sqrt()
                for t in range(40):
                    kept = normal[t] >= normal[t].max().clamp(max=threshold)
                    torch.testing.assert_close(gates[g][t, h], z[t].masked_fill(~kept, -torch.inf).softmax(-1))


def test_row30_monet_follows_the_statistics_of_a_batch_norm() -> None:
    router = MonetRouter(H, 3, 2, top_k=1).double()
    norms = [nn.BatchNorm1d(2, affine=False) for _ in range(2)]  # one per gate, a channel per head
    for _ in range(3):
        x = torch.randn(1, H).double()
        z = (x @ router.weight.T).view(1, 2, 2, 3).detach()
        for gate, norm in enumerate(norms):
            norm(z[:, gate].mT.flatten(0, 1).float())
        router(x)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(router, name), torch.cat([getattr(norm, name) for norm in norms]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_row30_monet_leaves_a_token_without_finite_squares_out_of_its_statistics(value: float) -> None:
    """It neither changes the gates of others, now or later, nor makes them keep every half."""
    router, x = MonetRouter(H, 32, 2, top_k=2), torch.randn(20, H)
    spoiled = torch.cat((x[:3], torch.full((1, H), value), x[3:]))
    twin = copy.deepcopy(router)
    others = torch.arange(21) != 3
    for found, wanted in zip(router(spoiled), twin(x), strict=True):
        torch.testing.assert_close(found[others], wanted)
        assert (found[others] > 0).sum(-1).float().mean() < 6
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(router, name), getattr(twin, name))
    before = router.running_mean.clone()
    router(spoiled[3:4])  # no token is left
    assert torch.equal(router.running_mean, before)
    assert router.running_var.isfinite().all()


def test_row30_monet_gates() -> None:
    router = MonetRouter(H, 64, 2, top_k=8)
    first, second = router(torch.randn(4000, H))
    for gate in (first, second):
        torch.testing.assert_close(gate.sum(-1), torch.ones(4000, 2))
    assert (first > 0).sum(-1).float().mean().item() == pytest.approx(8, rel=0.05)
    assert (second > 0).any(-1).all()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_row30_monet_follows_a_forward_once_under_checkpointing(use_reentrant: bool) -> None:
    layer, x = Monet(H, 8, 4, heads=2, top_k=2), torch.randn(10, H, requires_grad=True)
    repeated = copy.deepcopy(layer)
    layer(x).sum().backward()
    checkpoint(repeated, x, use_reentrant=use_reentrant).sum().backward()
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(repeated.router, name), getattr(layer.router, name))
    for own, other in zip(layer.parameters(), repeated.parameters(), strict=True):
        torch.testing.assert_close(other.grad, own.grad)


# ---- Branch-Train-Stitch ---------------------------------------------------------------------------------------------


def test_row85_stitched_is_a_loop_over_networks_and_maps() -> None:
    num_experts, x = 3, torch.randn(2, 5, H).double()
    layer = presets.build(H, 12, num_experts, **presets.branch_train_stitch(depth=3)).double()

    def run(network: nn.Module, row: Tensor) -> Tensor:
        return network.down_proj.weight @ (F.silu(network.gate_proj.weight @ row) * (network.up_proj.weight @ row))

    for row, found in zip(x.flatten(0, 1), layer(x).flatten(0, 1), strict=True):
        hub, states = row, [row] * num_experts
        for stage, stitch in enumerate(layer.stitches):
            hub = run(layer.hub[stage], hub)
            states = [run(own[stage], state) for own, state in zip(layer.experts, states, strict=True)]
            z, maps = stitch.gate.weight @ hub, [p.weight for p in stitch.projections]
            if stage == 1:
                g = z.sigmoid()
                states = [(1 - g[i]) * states[i] + g[i] * (maps[i] @ hub) for i in range(num_experts)]
            else:
                w = z.softmax(0)
                hub = w[0] * hub + sum(w[i + 1] * (maps[i] @ states[i]) for i in range(num_experts))
        torch.testing.assert_close(found, hub)


def test_row85_a_hub_without_experts_is_unchanged_bit_for_bit() -> None:
    """Experts may be of any size, and may be left out one by one, as if their gates were closed."""
    hub, experts = torch.randn(4, H), [torch.randn(4, 6), torch.randn(4, 9)]
    for into in ("hub", "experts"):
        stitch = StitchLayer(H, [6, 9], into)
        merged, states = stitch(hub, [None, None])
        assert torch.equal(merged, hub)
        assert states == [None, None]
    stitch = StitchLayer(H, [6, 9])
    merged, _ = stitch(hub, [experts[0], None])
    w = (hub @ stitch.gate.weight.T)[:, :2].softmax(-1)
    torch.testing.assert_close(merged, w[:, :1] * hub + w[:, 1:] * stitch.projections[0](experts[0]))
    with raises(ValueError, "experts"):
        stitch(hub, experts[:1])
    with raises(ValueError, "experts"):
        stitch(hub, experts[::-1])
    with raises(ValueError, "into"):
        StitchLayer(H, [6], "both")
    with raises(ValueError, "experts"):
        Stitched(H, [nn.Identity()], [[]])


def test_row85_only_the_maps_are_trained() -> None:
    layer = Stitched(H, [nn.Linear(H, H)], [[nn.Linear(H, H)], [nn.Linear(H, H)]])
    layer.hub.requires_grad_(False)
    layer.experts.requires_grad_(False)
    layer(torch.randn(4, H)).square().sum().backward()
    assert {name.split(".")[0] for name, p in layer.named_parameters() if p.grad is not None} == {"stitches"}


# ---- all of them -----------------------------------------------------------------------------------------------------

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "multi_head": lambda **o: MultiHeadMoE(moe(hidden_size=H // 2, **o), H, 2, **o),
    "cartesian": lambda **o: CartesianMoE(moe(**o), moe(**o), H, **o),
    "soft": lambda **o: SoftMoE(Experts(H, 12, 4, **o), slots=2, **o),
    "stratified": lambda **o: StratifiedMoE(H, 12, [2, 3], **o),
    "monet": lambda **o: Monet(H, 8, 4, 2, top_k=3, **o),
    "merged": lambda **o: MergedExperts(switchgear.Router(H, 4, 2, **o), Experts(H, 12, 4, **o)),
    "shared": lambda **o: GatedSharedExperts(H, 12, **o),
}


@pytest.mark.parametrize("name", LAYERS)
def test_round_trip_meta_and_bfloat16(name: str) -> None:
    layer, other, x = LAYERS[name]().eval(), LAYERS[name]().eval(), torch.randn(2, 6, H)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))
    empty = LAYERS[name](device="meta", dtype=torch.bfloat16)
    assert all(t.is_meta for t in empty.parameters())
    real = empty.to_empty(device="cpu").eval()
    for module in real.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    y = real(x.bfloat16())
    assert y.dtype is torch.bfloat16
    assert y.shape == x.shape
    assert y.isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_training_reduces_the_loss(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(4, 16, H)
    target = torch.tanh(x @ torch.randn(H, H) / math.sqrt(H))
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_experts_that_do_not_exist_are_refused() -> None:
    kinds = HeterogeneousExperts(H, [8, 16, 8]), VirtualExperts(Experts(H, 8, 2), copy=1)
    for experts in kinds:
        for wrong in (-2, 3):
            with raises(ValueError, "topk_ids"):
                experts(torch.randn(2, H), torch.tensor([[wrong], [0]], dtype=torch.int32), torch.ones(2, 1))


def test_ids_are_not_read_while_a_graph_is_made() -> None:
    for experts in (HeterogeneousExperts(H, [8, 16, 8]), VirtualExperts(Experts(H, 8, 2), copy=1)):

        def run(state: dict[str, Tensor], *args: Tensor, experts: nn.Module = experts) -> Tensor:
            return torch.func.functional_call(experts, state, args)

        state = {**dict(experts.named_parameters()), **dict(experts.named_buffers())}
        args = torch.randn(2, H), torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
        assert torch.equal(make_fx(run)(state, *args)(state, *args), experts(*args))
