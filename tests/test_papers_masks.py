# SPDX-License-Identifier: BSD-3-Clause
"""Papers that restrict a token to some experts, against float64 loops and by their claims."""

from __future__ import annotations

import math
import mmap
import resource
from typing import Any

import pytest
import torch
from torch import Tensor

import switchgear
from errors import raises
from loops import E, H, assert_agrees, best, layer_of, linear, mixture, switch_loss
from switchgear import presets
from switchgear.papers.parts.losses import alignment_loss
from switchgear.parallel.cost import count as traffic
from switchgear.parallel.placement import Placement
from switchgear.routing import Context, Grouped, Lookup, Masked, Random, Router, TokenIdMask, TopK

# ---- SAM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [0.0, 0.7])
def test_row15_sam_is_a_loop_of_two_routers(backend: str, alignment: float) -> None:
    layer = layer_of(presets.sam(num_groups=4, top_k=2, balance=0.1, alignment=alignment))

    def loop(layer: Any, x: Tensor) -> Any:
        groups = (x @ layer.gate.score.switch.weight.T).softmax(-1)
        inside = (x @ layer.gate.score.mixture.weight.T).view(len(x), 4, 2).softmax(-1)
        p = (groups[:, :, None] * inside).flatten(1)
        ids, weights = [], []
        for t in range(len(x)):
            g = best(groups[t], 1)[0]
            ids.append([2 * g + k for k in best(inside[t, g], 2)])
            weights.append([groups[t, g] * inside[t, g, e - 2 * g] for e in ids[-1]])
        loss = 0
        for g in range(4):
            load = sum(E / (2 * len(x)) * sum(e in choice for choice in ids) for e in (2 * g, 2 * g + 1)) / 2
            loss = loss + load * p[:, 2 * g : 2 * g + 2].sum(1).mean()
        excess = x.new_zeros(())
        for t, choice in enumerate(ids):
            least = min(p[t, e] for e in choice)
            excess = excess + sum((p[t, e] - least).clamp(min=0) for e in range(E) if e // 2 != choice[0] // 2)
        assert excess > 0
        return mixture(layer.experts, x, ids, weights), 0.1 * loss + alignment * excess / len(x)

    assert_agrees(layer, loop, torch.randn(20, H))


def test_alignment_loss() -> None:
    """0 if no other expert exceeds the chosen ones; empty choices and tokens without a choice count for nothing."""
    p = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.5, 0.3, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1]])
    groups = torch.tensor([0, 0, 1, 1])
    ids = torch.tensor([[0, 1], [0, 1], [-1, -1]], dtype=torch.int32)
    torch.testing.assert_close(alignment_loss(p, ids, groups), torch.tensor((0.2 + 0.1) / 3))
    ids = torch.tensor([[0, -1], [0, 1], [0, 2]], dtype=torch.int32)
    assert alignment_loss(p, ids, groups) == 0
    assert alignment_loss(p[:0], ids[:0], groups) == 0


def test_row15_sam_sends_a_token_to_one_group() -> None:
    logits = torch.randn(100, 12)
    routing = Grouped(3, 4)(logits)
    groups = routing.topk_ids // 3
    assert (groups == groups[:, :1]).all()
    one = Grouped(3, 1)(logits)
    assert torch.equal(one.topk_ids, TopK(3)(logits).topk_ids)
    p = logits.softmax(-1)
    group = p.view(100, 4, 3).sum(-1).argmax(-1)
    masked = p.masked_fill(torch.arange(12) // 3 != group[:, None], -1)
    torch.testing.assert_close(routing.topk_weights, masked.topk(3).values)
    native = Grouped(3, 4, 2, "top2_sum")(logits)
    assert torch.equal(native.topk_ids, TopK(3, num_groups=4, topk_groups=2, group_score="top2_sum")(logits).topk_ids)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("closed", [[5], [0, 3, 5], [4, 5]])
@pytest.mark.parametrize("least", [-0.2, -2.2])
def test_row15_sam_keeps_a_group_open_without_some_of_its_experts(
    least: float, closed: list[int], score_function: str
) -> None:
    """A loop over tokens: closed experts add nothing to their groups, and a closed group is never chosen, even where
    the sums of the others are negative."""
    logits, bias = torch.randn(100, 8), torch.linspace(least, least + 0.4, 8)
    shut = bias.index_fill(0, torch.tensor(closed), -torch.inf)
    select = Grouped(2, 4, 2, score_function=score_function)
    chosen = []
    for z in logits.double():
        p = z.softmax(-1) if score_function == "softmax" else 1 / (1 + (-z).exp())
        value = {e: float(p[e] + bias[e]) for e in range(8) if e not in closed}
        groups = [[e for e in (2 * g, 2 * g + 1) if e in value] for g in range(4)]
        best = sorted(groups, key=lambda group: -sum(value[e] for e in group) if group else math.inf)[:2]
        chosen.append(set(sorted((e for group in best for e in group), key=lambda e: -value[e])[:2]))
    assert [set(row) for row in select(logits, Context(), shut).topk_ids.tolist()] == chosen
    router = Router(4, 8, select=select).eval()
    with router.intervene(disable=closed, bias=bias):
        assert [set(row) for row in router.decide(logits).topk_ids.tolist()] == chosen
    masked = Masked(Grouped(2, 4), lambda logits, context: shut > -torch.inf)(logits, Context(), torch.zeros(8))
    assert set(masked.topk_ids.flatten().tolist()) - {-1} == set(range(8)) - set(closed)
    one = Grouped(2, 4)(logits, Context(), shut).topk_ids // 2  # fewer open experts than choices do not leave the group
    assert torch.equal(one[:, 0], one[:, 1])


@pytest.mark.parametrize("closed", [[], [5], [0, 3, 5], [4, 5, 6, 7]])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_groups_are_ranked_by_the_sum_of_their_best(count: int, score_function: str, closed: list[int]) -> None:
    """A loop over tokens, with a bias; "max" and "top2_sum" are 1 and 2 for every score function."""
    logits, bias = torch.randn(60, 12), torch.linspace(-0.2, 0.2, 12)
    shut = bias.index_fill(0, torch.tensor(closed, dtype=torch.int64), -torch.inf)
    names = {1: ["max"], 2: ["top2_sum"]}.get(count, [])
    chosen, weights = [], []
    for z in logits.double():
        p = {"softmax": z.softmax(-1), "sigmoid": z.sigmoid(), "sqrt_softplus": z.exp().log1p().sqrt()}[score_function]
        value = {e: float(p[e] + bias[e]) for e in range(12) if e not in closed}
        groups = [[e for e in range(4 * g, 4 * g + 4) if e in value] for g in range(3)]
        ranked = [sum(sorted((value[e] for e in group), reverse=True)[:count]) if group else -9 for group in groups]
        best = [groups[g] for g in sorted(range(3), key=lambda g: -ranked[g])[:2]]
        row = sorted((e for group in best for e in group), key=lambda e: -value[e])[:3]
        chosen.append(row)
        weights.append([float(p[e]) for e in row])
    for group_score in (count, *names):
        found = Grouped(3, 3, 2, group_score, score_function)(logits, Context(), shut)
        assert found.topk_ids.tolist() == chosen
        torch.testing.assert_close(found.topk_weights, torch.tensor(weights))
    for name in names:
        same = TopK(3, score_function, num_groups=3, topk_groups=2, group_score=name)(logits, Context(), shut)
        assert same.topk_ids.tolist() == chosen


def test_row15_sam_sends_a_token_to_one_other_rank_at_most() -> None:
    """Groups are ranks: an exchange sends one row per token, while flat top-k sends up to K."""
    placement = Placement.contiguous(12, 4)
    logits = [torch.randn(50, 12) for _ in range(4)]  # for the tokens of each rank

    def remote(select: Any) -> int:
        ids = [select(z).topk_ids for z in logits]
        rows = traffic(ids, placement).rows
        copies = sum(len({e // 3 for e in row} - {rank}) for rank in range(4) for row in ids[rank].tolist())
        assert int(rows.sum() - rows.diagonal().sum()) == copies
        return copies

    assert remote(Grouped(3, 4)) <= 200 < remote(TopK(3))
    assert remote(Grouped(3, 4, 2)) <= 400


# ---- MaskMoE ---------------------------------------------------------------------------------------------------------

COUNTS = torch.tensor([1, 100, 3, 50, 2, 60])


def test_row16_maskmoe_is_a_loop_over_visible_experts(backend: str) -> None:
    layer = layer_of(presets.maskmoe(COUNTS, frequent_from=50, rare_experts=2, top_k=2, balance=0.1))
    token_ids = torch.randint(len(COUNTS), (20,))
    visible = layer.gate.select.mask.visible

    def loop(layer: Any, x: Tensor) -> Any:
        z = linear(layer, x)
        p = torch.stack([row.masked_fill(~visible[v], -math.inf).softmax(-1) for row, v in zip(z, token_ids)])  # noqa: B905
        ids = [best(row, 2, visible[v].nonzero().flatten().tolist()) for row, v in zip(p, token_ids, strict=True)]
        y = mixture(layer.experts, x, ids, [p[t, choice] for t, choice in enumerate(ids)])
        return y, 0.1 * switch_loss(p, ids)

    assert_agrees(layer, loop, torch.randn(20, H), token_ids=token_ids)
    assert visible.sum(1).tolist() == [2, E, 2, E, 2, E]


def test_row16_maskmoe_sends_a_rare_id_to_its_expert_in_every_batch() -> None:
    layer = layer_of(presets.maskmoe(COUNTS, frequent_from=50), return_routing=True)
    (own,) = layer.gate.select.mask.visible[2].nonzero().flatten().tolist()
    for _ in range(3):
        x, token_ids = torch.randn(30, H), torch.randint(len(COUNTS), (30,))
        routing = layer(x, token_ids=token_ids)[1]
        rare = token_ids == 2
        assert (routing.topk_ids[rare] == own).all()
        torch.testing.assert_close(routing.topk_weights[rare], torch.ones(int(rare.sum()), 1))
        logits = routing.router_logits
        hidden = ~layer.gate.select.mask.visible[token_ids]
        assert not logits.softmax(-1)[hidden].any()
        (grad,) = torch.autograd.grad(routing.topk_weights.sum(), layer.gate.weight)
        assert grad.isfinite().all()
    with raises(ValueError, "token_ids"):
        layer(x)


def test_row16_maskmoe_hides_from_gradients_too() -> None:
    """A hidden expert has probability 0 and gradient 0, for any use of the weights, including the losses."""
    layer = layer_of(presets.maskmoe(COUNTS, frequent_from=50, rare_experts=3, top_k=2, balance=0.1))
    token_ids = torch.randint(len(COUNTS), (30,))
    hidden = ~layer.gate.select.mask.visible[token_ids]
    logits = torch.randn(30, E, requires_grad=True)
    context = Context(token_ids=token_ids, training=True)
    routing = layer.gate.select(logits, context)
    loss = (routing.topk_weights * torch.randn(30, 2)).sum() + layer.gate.balance[0](routing, context)
    (grad,) = torch.autograd.grad(loss, logits)
    assert not grad[hidden].any()
    assert grad[~hidden].any()


@pytest.mark.parametrize("select", [Random(1), Random(2), Random(2, "batch")], ids=str)
def test_random_experts_are_drawn_from_those_a_mask_allows(select: Random) -> None:
    """Every token may use another half of the experts, and gets as many as without a mask."""
    even, tokens = torch.arange(8) % 2 == 0, torch.arange(100)
    mask = (tokens % 2 == 0)[:, None] == even
    for bias in (None, torch.zeros(8)):
        ids = Masked(select, lambda logits, context: mask)(torch.zeros(100, 8), Context(), bias).topk_ids
        assert ids.shape[1] == select.top_k
        assert (ids % 2 == tokens[:, None] % 2).all()


def test_row16_maskmoe_that_hides_nothing_is_top_k() -> None:
    mask, logits = TokenIdMask(torch.ones(5, E)), torch.randn(9, E)
    masked = Masked(TopK(2), mask)(logits, Context(token_ids=torch.randint(5, (9,))))
    plain = TopK(2)(logits)
    assert torch.equal(masked.topk_ids, plain.topk_ids)
    assert torch.equal(masked.topk_weights, plain.topk_weights)


# ---- word experts ----------------------------------------------------------------------------------------------------


def test_row17_word_experts_are_a_table(backend: str) -> None:
    layer = layer_of(presets.word_experts(vocabulary_size=30, top_k=2))
    token_ids, table = torch.randint(30, (2, 10)), layer.gate.select.table

    def loop(layer: Any, x: Tensor) -> Tensor:
        ids = [table[v].tolist() for v in token_ids.flatten()]
        return mixture(layer.experts, x.flatten(0, 1), ids, [[0.5, 0.5]] * 20).view(x.shape)

    assert_agrees(layer, loop, torch.randn(2, 10, H), token_ids=token_ids)
    assert not [*layer.gate.parameters()]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.tensor([7]), ValueError, "expected 4 tokens, got 1"),
        (torch.arange(5), ValueError, "expected 4 tokens, got 5"),
        (torch.tensor([0, -100, 1, 2]), ValueError, "expected 0 to 9, got -100 to 2"),
        (torch.tensor([0, 10, 1, 2]), ValueError, "expected 0 to 9, got 0 to 10"),
        (torch.tensor([True, False, True, True]), TypeError, r"expected a tensor of integers, got torch\.bool"),
        (torch.zeros(4), TypeError, r"expected a tensor of integers, got torch\.float32"),
        ([0, 1, 2, 3], TypeError, "expected Tensor, got list"),
    ],
)
@pytest.mark.parametrize("select", [Lookup(torch.zeros(10)), Masked(TopK(2), TokenIdMask(torch.ones(10, 8)))])
def test_token_ids_are_checked(select: Any, given: Any, error: type[Exception], message: str) -> None:
    with raises(error, "token_ids"):
        select(torch.zeros(4, 8), Context(token_ids=given))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_token_ids_of_few_bits_are_numbers(dtype: torch.dtype) -> None:
    """torch would take uint8 for a mask."""
    table, ids = torch.tensor([3, 1, 2]), torch.tensor([1, 0, 1, 2])
    chosen = Lookup(table)(torch.zeros(4, 8), Context(token_ids=ids.to(dtype))).topk_ids
    assert chosen.flatten().tolist() == [1, 3, 1, 2]


def test_row17_word_experts_by_the_ten_thousands() -> None:
    """Many more experts than tokens: the plan has a slot per token, and unused experts get no gradient."""
    layer = switchgear.MoE(8, 1, 32_768, **presets.word_experts(vocabulary_size=100), return_routing=True)
    token_ids, x = torch.randint(100, (64,)), torch.randn(64, 8)
    y, routing = layer(x, token_ids=token_ids)
    plan = switchgear.plan(routing.topk_ids, routing.num_experts)
    assert plan.token_indices.shape == (64,)
    y.sum().backward()
    touched = layer.gate.select.table[token_ids].unique().long()
    assert set(layer.experts.down_proj.grad.flatten(1).any(1).nonzero().flatten().tolist()) <= set(touched.tolist())
    assert layer.experts.down_proj.grad[touched].any()
    holes = Lookup(torch.tensor([[0, -1], [3, 1]]))(torch.zeros(2, 4), Context(token_ids=torch.tensor([0, 1])))
    assert holes.topk_weights.tolist() == [[0.5, 0.0], [0.5, 0.5]]


def pages_touched(call: Any) -> int:
    """Memory pages that the call touches for the first time."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="needs mmap of memory without reservation")
def test_row17_word_experts_cost_their_tokens_and_not_their_number(isa: str) -> None:
    """O(T): 32 tokens read the weights of 32 experts, out of 1024 or 32,768. The memory was never touched before, so
    each page that is read counts. All experts would be thirty-two times as many."""
    tokens, width, page = 32, 32, mmap.PAGESIZE
    x, pages = torch.randn(tokens, 64), {}
    of_an_expert = 2 + math.ceil(2 * width * 64 * 4 / page) + math.ceil(64 * width * 4 / page)
    for num_experts in (1024, 32_768):
        table = (torch.arange(tokens) * (num_experts // tokens)).int()[:, None]
        select = Lookup(table)
        layer = switchgear.MoE(64, width, num_experts, select=select, device="meta").eval()
        for name, parameter in list(layer.experts.named_parameters()):
            memory = mmap.mmap(-1, parameter.numel() * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
            untouched = torch.frombuffer(memory, dtype=torch.float32).view(parameter.shape)
            setattr(layer.experts, name, torch.nn.Parameter(untouched, requires_grad=False))
        select.table = table
        with torch.no_grad():
            routing = layer.gate(x, Context(token_ids=torch.arange(tokens)))
            assert routing.router_logits.untyped_storage().nbytes() < 100  # no [T,E]
            pages[num_experts] = pages_touched(lambda layer=layer: layer(x, token_ids=torch.arange(tokens)))
    offsets = math.ceil(32_769 * 4 / page)  # the plan has one per expert, and as many counters
    assert pages[32_768] < tokens * of_an_expert + 16 * offsets
    assert pages[32_768] < 32_768 * of_an_expert / 32
