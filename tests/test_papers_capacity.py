# SPDX-License-Identifier: BSD-3-Clause
"""Papers about experts with too many tokens: which are dropped, which are rerouted, and which are harmed by other
users' tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import switchgear
from errors import raises
from loops import E, H, I, assert_agrees, best, counts_of, layer_of, mixture
from switchgear import presets
from switchgear.functional import Routing
from switchgear.routing import Capacity, CapacityByKind, Context, Dropless, ExpertChoice, Masked, SkipBelow, TopK
from switchgear.routing.context import NOTHING_KNOWN

K = 2


def routing_of(logits: Tensor, top_k: int = K) -> Routing:
    return TopK(top_k)(logits)._replace(scores=logits.softmax(-1))


def places(factor: float, routing: Routing) -> int:
    """⌈factor · choices / E⌉ of the choices that were made."""
    return math.ceil(factor * int((routing.topk_ids >= 0).sum()) / E)


def skewed(num_tokens: int = 40) -> Tensor:
    return torch.randn(num_tokens, E) + torch.linspace(2, -2, E)


def precedence(routing: Routing, drop: str) -> list[tuple[int, int]]:
    """The choices (token, position), in the order in which they take capacity."""
    choices = [(t, k) for t in range(len(routing.topk_ids)) for k in range(routing.topk_ids.shape[1])]
    w = routing.topk_weights
    keys = {
        "order": lambda c: c,
        "choice": lambda c: (c[1], c[0]),
        "reverse": lambda c: (-c[0], -c[1]),
        "score": lambda c: (-float(w[c]), c),
    }
    return sorted(choices, key=keys[drop])


def limited(routing: Routing, capacity: int, drop: str) -> tuple[list[list[int]], list[int]]:
    """The ids that stay, and the remaining capacity."""
    ids = routing.topk_ids.tolist()
    room = [capacity] * routing.num_experts
    for t, k in precedence(routing, drop):
        e = ids[t][k]
        if e >= 0 and room[e] > 0:
            room[e] -= 1
        else:
            ids[t][k] = -1
    return ids, room


@pytest.mark.parametrize("drop", ["order", "choice", "reverse", "score"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_row36_capacity_aware_inference_drops_as_a_loop_does(backend: str, drop: str, factor: float) -> None:
    routing = routing_of(skewed())
    routing.topk_ids[3, 1] = routing.topk_ids[7, 0] = -1  # holes use no capacity and give none
    out = Capacity(factor, drop)(routing, NOTHING_KNOWN)
    wanted, _ = limited(routing, places(factor, routing), drop)
    assert out.topk_ids.tolist() == wanted
    kept = out.topk_ids >= 0
    assert torch.equal(out.topk_weights, routing.topk_weights * kept)
    assert out.num_dropped == (routing.topk_ids >= 0).sum() - kept.sum() > 0
    per_sequence = Capacity(factor, drop, scope="sequence")(routing, Context(sequence_length=20))
    for s in range(2):
        mine = slice(20 * s, 20 * s + 20)
        part = routing._replace(topk_ids=routing.topk_ids[mine], topk_weights=routing.topk_weights[mine])
        assert per_sequence.topk_ids[mine].tolist() == limited(part, places(factor, part), drop)[0]


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize(
    ("factor", "num_experts", "limit"), [(1.1, 10, 11), (0.7, 10, 7), (1.15, 4, 29), (0.29, 1, 29)]
)
def test_a_capacity_is_that_of_the_factor_as_it_is_written(
    scope: str, factor: float, num_experts: int, limit: int
) -> None:
    """1.1 · 100 / 10 is 11, which binary fractions exceed."""
    routing = TopK(1)(torch.eye(1, num_experts).expand(100, -1))
    out = Capacity(factor, scope=scope)(routing, Context(sequence_length=100))
    assert counts_of(out.topk_ids) == [limit, *[0] * (E - 1)]


def test_candidates_are_counted_by_the_choices_of_their_token() -> None:
    """⌈k · expand⌉ of a token with k choices: as wide as another token is, and as the factor is written. Each expert
    keeps the second token's candidates, and the first token its five best of what is left of its own."""
    logits = torch.arange(10.0).flip(0).expand(3, 10)
    routing = TopK(5)(logits)._replace(scores=logits.softmax(-1))
    routing.topk_ids[1, 1:] = -1
    routing.topk_ids[2] = -1
    for expand, first in ((2.0, [2, 3, 4, 5, 6]), (1.2, [2, 3, 4, 5])):
        out = Capacity(1.0, "reverse", "overselect", expand=expand)(routing, NOTHING_KNOWN)
        assert [[e for e in row if e >= 0] for row in out.topk_ids.tolist()] == [first, [0], []]
        assert out.topk_ids.shape == (3, 5)
    out = Capacity(9.0, overflow="overselect")(routing, NOTHING_KNOWN)
    assert (out.topk_ids >= 0).sum(1).tolist() == [10, 10, 0]
    assert out.topk_ids.shape == (3, 10)  # choices and candidates, without columns that no token can fill
    alone = Capacity(0.1, overflow="reroute", expand=2.0)(TopK(1)(logits[:2]), NOTHING_KNOWN)
    assert alone.topk_ids.tolist() == [[0], [1]]
    alone = Capacity(0.1, overflow="reroute", expand=2.0)(TopK(1)(logits), NOTHING_KNOWN)
    assert alone.topk_ids.tolist() == [[0], [1], [-1]]


@pytest.mark.parametrize("overflow", ["reroute", "overselect"])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrt_softplus"])
def test_masked_experts_take_nothing_over(overflow: str, score_function: str) -> None:
    """A token's masked experts neither serve it nor use up a place that another token could have."""
    allowed = torch.ones(40, E, dtype=torch.bool)
    allowed[::2, 2:] = False
    select = Masked(TopK(2, score_function), lambda z, context: allowed)
    routing = select(skewed(), NOTHING_KNOWN)
    out = Capacity(1.0, "order", overflow)(routing, NOTHING_KNOWN)
    kept = out.topk_ids >= 0
    assert allowed.gather(1, out.topk_ids.clamp(min=0).long())[kept].all()
    if overflow == "reroute":  # no token that lost a choice may use a free place
        load = torch.tensor(counts_of(out.topk_ids))
        lost = (~kept & (routing.topk_ids >= 0)).any(1)
        has = torch.zeros_like(allowed).scatter(1, out.topk_ids.clamp(min=0).long(), kept)
        assert ((load == places(1.0, routing)) | has | ~allowed)[lost].all()
        assert (out.topk_ids != routing.topk_ids)[1::2].any()


@pytest.mark.parametrize("expand", [None, 2.0])
@pytest.mark.parametrize("drop", ["order", "score", "random"])
def test_row36_capacity_aware_inference_reroutes_to_whoever_has_room(drop: str, expand: float | None) -> None:
    logits = skewed()
    routing = routing_of(logits)
    capacity = math.ceil(1.1 * K * 40 / E)
    out = Capacity(1.1, drop, "reroute", expand=expand)(routing, NOTHING_KNOWN)
    load = counts_of(out.topk_ids)
    assert max(load) <= capacity
    candidates = E if expand is None else math.ceil(K * expand)
    for t, row in enumerate(out.topk_ids.tolist()):
        chosen = [e for e in row if e >= 0]
        assert len(set(chosen)) == len(chosen)
        allowed = best(logits[t], candidates)
        assert set(chosen) <= set(allowed)
        if len(chosen) < K:  # then each candidate is full or already has the token
            assert all(load[e] == capacity or e in chosen for e in allowed)
    dropped = (out.topk_ids < 0).sum()
    assert out.num_dropped == dropped
    plain = Capacity(1.1, drop)(routing, NOTHING_KNOWN)
    assert dropped < (plain.topk_ids < 0).sum()
    stays = plain.topk_ids >= 0
    if drop != "random":
        assert torch.equal(out.topk_ids[stays], plain.topk_ids[stays])  # placed choices do not change
    moved = (out.topk_ids != routing.topk_ids) & (out.topk_ids >= 0)
    p = logits.softmax(-1)
    wanted = p.gather(1, out.topk_ids.clamp(min=0).long())
    torch.testing.assert_close(out.topk_weights[moved], wanted[moved])


def test_row36_capacity_aware_inference_rerouting_is_a_loop_in_order_of_scores() -> None:
    """Rounds over the candidates; in each, tokens with dropped choices offer one to their next candidate."""
    logits = skewed()
    routing = routing_of(logits)
    p, capacity = logits.softmax(-1), math.ceil(K * 40 / E)
    ids, room = limited(routing, capacity, "score")
    weights = routing.topk_weights.tolist()
    original = routing.topk_ids.tolist()
    others = [[e for e in best(row, E) if e not in original[t]] for t, row in enumerate(logits)]
    for place in range(E - K):
        offers = [(t, ids[t].index(-1)) for t in range(40) if -1 in ids[t]]
        for t, k in sorted(offers, key=lambda c: (-weights[c[0]][c[1]], c[0])):
            e = others[t][place]
            if room[e] > 0:
                room[e] -= 1
                ids[t][k] = e
    out = Capacity(1.0, "score", "reroute")(routing, NOTHING_KNOWN)
    assert out.topk_ids.tolist() == ids
    assert (out.topk_weights[out.topk_ids >= 0] > 0).all()
    assert p.shape == (40, E)


def test_row36_capacity_aware_inference_reroutes_by_the_scores_of_the_selection_inside() -> None:
    """The new weight is the expert's own score: a sigmoid, even if another selection wraps it."""
    select = SkipBelow(Masked(TopK(2, "sigmoid"), lambda z, context: None), 0.0)
    router = switchgear.Router(H, E, select=select, capacity=Capacity(1.0, "order", "reroute"))
    x = torch.randn(40, H)
    routing = router(x)
    kept = routing.topk_ids >= 0
    wanted = (x @ router.weight.T).sigmoid().gather(1, routing.topk_ids.clamp(min=0).long())
    torch.testing.assert_close(routing.topk_weights[kept], wanted[kept])
    plain = TopK(2, "sigmoid")(x @ router.weight.T).topk_ids
    assert ((routing.topk_ids != plain) & kept).any()


@pytest.mark.parametrize("overflow", ["drop", "reroute"])
def test_row36_capacity_aware_inference_layer_is_a_loop(backend: str, overflow: str) -> None:
    """Forward and gradients of the whole layer in evaluation, for the choice of the router."""
    layer = layer_of(presets.capacity_aware(gamma=1.0, overflow=overflow), return_routing=True).eval()
    x = torch.randn(30, H) + 1
    ids = layer(x)[1].topk_ids.tolist()
    assert max(counts_of(torch.tensor(ids))) <= math.ceil(K * 30 / E)

    def loop(layer: Any, x: Tensor) -> Tensor:
        p = (x @ layer.gate.weight.T).softmax(-1)
        return mixture(layer.experts, x, ids, [[p[t, e] for e in choice] for t, choice in enumerate(ids)])

    assert_agrees(layer, loop, x)


@pytest.mark.parametrize("overflow", ["drop", "reroute", "overselect"])
def test_row36_capacity_aware_inference_normalises_again_after_a_drop(backend: str, overflow: str) -> None:
    """Mixtral's weights sum to 1; so do those of the experts that a token keeps."""
    layer = layer_of(presets.capacity_aware(gamma=0.75, overflow=overflow, expand=2.0, normalize=True)).eval()
    layer.gate.weight.data.mul_(4)

    def loop(layer: Any, x: Tensor) -> Tensor:
        p = (x @ layer.gate.weight.T).softmax(-1)
        ids = kept_by_loop(p, math.ceil(0.75 * K * len(x) / E), overflow)
        assert any(len(row) < K for row in ids)
        weights = [[p[t, e] / sum(p[t, c] for c in row) for e in row] for t, row in enumerate(ids)]
        return mixture(layer.experts, x, ids, weights)

    assert_agrees(layer, loop, torch.randn(40, H))


def kept_by_loop(p: Tensor, capacity: int, overflow: str) -> list[list[int]]:
    """Each token's experts after a capacity by score: as in the authors' code an expert keeps the tokens of the largest
    probability among all experts, which only then is divided by the sum of those that its token keeps."""
    p = p.detach()
    wanted = [best(row, K if overflow != "overselect" else 2 * K) for row in p]
    offers = sorted((-float(p[t, e]), t, k) for t, row in enumerate(wanted) for k, e in enumerate(row))
    room, kept, lost = [capacity] * E, [[] for _ in p], []
    for priority, t, k in offers:
        e = wanted[t][k]
        if room[e]:
            room[e] -= 1
            kept[t].append(e)
        else:
            lost.append((priority, t, k))
    if overflow == "reroute":  # rounds over the other candidates; a token offers its first lost choice
        for round_ in range(K):
            offers = [(pr, t, k) for pr, t, k in lost if k == min(k for _, u, k in lost if u == t)]
            for offer in sorted(offers):
                e = best(p[offer[1]], 2 * K)[K + round_]
                if room[e]:
                    room[e] -= 1
                    kept[offer[1]].append(e)
                    lost.remove(offer)
    return [sorted(row, key=wanted[t].index)[:K] for t, row in enumerate(kept)] if overflow == "overselect" else kept


def test_row36_capacity_aware_inference_ranks_by_scores_before_they_are_normalised() -> None:
    """Divided by its token's sum, 0.46 of the second token would exceed 0.50 of the first one."""
    logits = torch.tensor([[0.50, 0.45, 0.05], [0.46, 0.28, 0.26]]).log()
    for scale in (1.0, -2.0):
        out = Capacity(0.7, "score")(TopK(2, normalize=True, scale=scale)(logits), NOTHING_KNOWN)
        assert out.topk_ids.tolist() == [[0, 1], [-1, -1]]


@pytest.mark.parametrize("limit", [Capacity(0.5, "score"), CapacityByKind(0, 1.0, Capacity(0.5, "score"))])
@pytest.mark.parametrize("score_function", ["sigmoid", "sqrt_softplus"])
def test_row36_capacity_aware_inference_ranks_by_the_scores_of_its_router(limit: Any, score_function: str) -> None:
    """Of each expert alone, without the selection bias; the softmax of a token would depend on its other logits."""
    router = switchgear.Router(
        H, E, select=TopK(2, score_function, normalize=True), capacity=limit, selection_bias=True
    )
    router.e_score_correction_bias.copy_(torch.linspace(-2, 2, E))
    x = 3 * torch.randn(40, H)
    logits = (x @ router.weight.T).detach().double()
    scores = logits.sigmoid() if score_function == "sigmoid" else logits.exp().log1p().sqrt()
    wanted = [set(best(row, 2)) for row in scores + router.e_score_correction_bias]
    for e in range(E):
        tokens = sorted((t for t in range(40) if e in wanted[t]), key=lambda t: (-float(scores[t, e]), t))
        kept = (router(x).topk_ids == e).any(1).nonzero().flatten().tolist()
        assert kept == sorted(tokens[: math.ceil(0.5 * 2 * 40 / E)])


@pytest.mark.parametrize("normalize", [False, True])
def test_row36_capacity_aware_inference_expanded_drop_of_the_authors_code(normalize: bool) -> None:
    """All experts are candidates of each token: an expert keeps its best tokens, and a token all that keep it."""
    layer = layer_of(presets.capacity_aware(gamma=1.0, overflow="overselect", normalize=normalize)).eval()
    layer.gate.weight.data.mul_(4)

    def loop(layer: Any, x: Tensor) -> Tensor:
        p = (x @ layer.gate.weight.T).softmax(-1)
        taken = [best(p[:, e].detach(), math.ceil(K * len(x) / E)) for e in range(E)]
        ids = [[e for e in range(E) if t in taken[e]] for t in range(len(x))]
        assert max(map(len, ids)) > K
        whole = [sum(p[t, e] for e in row) if normalize else 1 for t, row in enumerate(ids)]
        return mixture(layer.experts, x, ids, [[p[t, e] / whole[t] for e in row] for t, row in enumerate(ids)])

    assert_agrees(layer, loop, torch.randn(40, H))


def test_row36_capacity_aware_inference_overselects_drops_and_cuts_back() -> None:
    """Of a token's ⌈K · expand⌉ candidates some experts keep it; it goes to the K best of them, as in the patch of the
    authors' code, whose blocks choose K of what the capacity left."""
    layer = layer_of(presets.capacity_aware(gamma=1.0, overflow="overselect", expand=2.0), return_routing=True).eval()
    x = torch.randn(40, H)
    _, routing = layer(x)
    p = (x @ layer.gate.weight.T).softmax(-1).detach()
    ids = [sorted(e for e in row if e >= 0) for row in routing.topk_ids.tolist()]
    wanted = [best(row, 2 * K) for row in p]
    offers = sorted((-float(p[t, e]), t, e) for t, row in enumerate(wanted) for e in row)
    taken = {e: [t for _, t, c in offers if c == e][: math.ceil(K * 40 / E)] for e in range(E)}
    left = [[e for e in row if t in taken[e]] for t, row in enumerate(wanted)]
    assert max(map(len, left)) > K
    assert ids == [sorted(row[:K]) for row in left]
    assert routing.topk_ids.shape == (40, K)
    kept = routing.topk_ids >= 0
    torch.testing.assert_close(routing.topk_weights[kept], p.gather(1, routing.topk_ids.clamp(min=0).long())[kept])
    assert routing.num_dropped == sum(max(K - len(row), 0) for row in ids)


def test_row36_capacity_aware_inference_has_no_capacity_in_a_decoding_step() -> None:
    """40 sequences of one token each, all for the same expert."""
    layer = layer_of(presets.capacity_aware(top_k=1, gamma=1.0, overflow="drop"), return_routing=True).eval()
    x = torch.randn(1, H).expand(40, H)
    assert int(layer(x)[1].num_dropped) == 40 - 5
    assert int(layer(x[:, None])[1].num_dropped) == 0
    assert int(layer(x[None])[1].num_dropped) == 40 - 5
    assert int(layer.train()(x[:, None])[1].num_dropped) == 0  # the preset has no limit in training
    limit = Capacity(1.0, prefill_only=True)
    routing = routing_of(torch.randn(1, E).expand(40, E), 1)
    assert int(limit(routing, Context(sequence_length=1, training=True)).num_dropped) == 40 - 5


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_a_smallest_capacity(scope: str) -> None:
    routing = routing_of(torch.randn(1, E).expand(6, E))
    context = Context(sequence_length=6)
    assert counts_of(Capacity(0.1, scope=scope)(routing, context).topk_ids).count(1) == K
    assert max(counts_of(Capacity(0.1, scope=scope, minimum=4)(routing, context).topk_ids)) == 4
    assert max(counts_of(Capacity(9, scope=scope, minimum=4)(routing, context).topk_ids)) == 6


def test_row36_capacity_aware_inference_without_a_limit_is_top_k() -> None:
    layer, x = layer_of(presets.capacity_aware(gamma=1.0), return_routing=True), torch.randn(30, H)
    assert layer(x)[1].num_dropped == 0  # in training
    routing = routing_of(skewed())
    assert torch.equal(Capacity(math.inf)(routing, NOTHING_KNOWN).topk_ids, routing.topk_ids)
    alone = layer.eval()(x[:1])[1]  # one token always fits
    assert torch.equal(alone.topk_ids, switchgear.route(x[:1] @ layer.gate.weight.T, 2).topk_ids)


def test_row36_capacity_aware_inference_lowers_the_largest_load() -> None:
    """The time of a layer in expert parallelism is proportional to max load / mean load."""
    routing = routing_of(skewed(400))
    before = max(counts_of(routing.topk_ids)) / (K * 400 / E)
    after = max(counts_of(Capacity(1.25, "score")(routing, NOTHING_KNOWN).topk_ids)) / (K * 400 / E)
    assert before > 2 > 1.26 > after


def test_row38_towards_moe_deployment_dropless_is_a_capacity_of_all_tokens() -> None:
    routing = routing_of(skewed())
    everyone = Capacity(E / K)(routing, NOTHING_KNOWN)  # C = T
    assert torch.equal(Dropless()(routing, NOTHING_KNOWN).topk_ids, everyone.topk_ids)
    assert everyone.num_dropped == 0
    plan = switchgear.plan(routing.topk_ids, E)
    assert len(plan.token_indices) == 40 * K  # rows of work: T·K, not E·C


def test_row35_openmoe_drops_towards_the_end_of_a_sequence() -> None:
    """Later positions lose more with drop="order", all equally with "random"."""
    logits = torch.randn(64, 128, E) + torch.linspace(1, -1, E)
    routing = routing_of(logits.flatten(0, 1))
    context = Context(sequence_length=128, generator=torch.Generator().manual_seed(1))

    def rates(drop: str) -> Tensor:
        out = Capacity(1.0, drop, scope="sequence")(routing, context)
        return (out.topk_ids < 0).float().view(64, 8, 16 * K).mean((0, 2))  # per eighth of a sequence

    order, reverse, random = rates("order"), rates("reverse"), rates("random")
    assert (order.diff() >= 0).all()
    assert order[-1] > 0.3
    assert order[0] == 0
    assert reverse[0] > 0.3
    assert reverse[-1] == 0
    assert random.max() - random.min() < 0.05


def test_row35_openmoe_layer_has_both_losses(backend: str) -> None:
    layer = layer_of(presets.openmoe(capacity_factor=8.0, balance=0.1, z=0.05))

    def loop(layer: Any, x: Tensor) -> Any:
        logits = x @ layer.gate.weight.T
        p = logits.softmax(-1)
        ids = [best(row, 2) for row in p]
        load = [sum(e in choice for choice in ids) / len(x) for e in range(E)]
        z = sum(torch.log(sum(v.exp() for v in row)) ** 2 for row in logits) / len(x)
        y = mixture(layer.experts, x, ids, [p[t, choice] for t, choice in enumerate(ids)])
        return y, 0.1 * E * sum(load[e] * p[:, e].mean() for e in range(E)) + 0.05 * z

    assert_agrees(layer, loop, torch.randn(20, H))


def test_row35_openmoe_has_the_constants_of_its_training_code() -> None:
    layer, x = layer_of(presets.openmoe(), return_routing=True), torch.randn(1, H).expand(32, H)
    assert [loss.coefficient for loss in layer.gate.balance] == [1e-2, 1e-4]
    assert int(layer(x)[1].num_dropped) == 2 * (32 - 10)  # ⌈1.25 · 2 · 32 / 8⌉ = 10
    assert int(layer(x[:6])[1].num_dropped) == 2 * (6 - 4)  # at least 4 instead of 2
    assert int(layer.eval()(x)[1].num_dropped) == 2 * (32 - 16)


def test_row35_openmoe_gives_places_to_first_choices_before_second_ones() -> None:
    """As the training code's router of two experts: the places of second choices come after those of all first ones."""
    layer, x = layer_of(presets.openmoe(), return_routing=True), torch.randn(64, H) + 2 * torch.randn(H)
    layer.gate.weight.data.mul_(4)
    ids = layer(x)[1].topk_ids
    first, second = ([best(row, 2)[k] for row in x @ layer.gate.weight.T] for k in (0, 1))
    capacity = math.ceil(1.25 * 2 * 64 / E)  # 20, an even number, as in that code
    kept: list[list[int]] = []
    for t in range(64):
        before = first[:t].count(first[t]), first.count(second[t]) + second[:t].count(second[t])
        kept.append([e if rank < capacity else -1 for e, rank in zip((first[t], second[t]), before, strict=True)])
    assert ids.tolist() == kept
    in_token_order, _ = limited(TopK(2)(x @ layer.gate.weight.T), capacity, "order")
    assert in_token_order != kept


# ---- buffer overflow, stolen prompts ---------------------------------------------------------------------------------


def attacked(layer: Any, victim: Tensor, stranger: Tensor) -> Tensor:
    """The victim's output [S,H], with another user's sequence first in the batch."""
    return layer(torch.stack((stranger, victim)))[1]


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_row79_buffer_overflow_pushes_a_victim_out_of_a_shared_buffer(isa: str, scope: str) -> None:
    """The attacker sends tokens like the victim's. With drop="order" over the batch they take its capacity; within
    sequences, or without a capacity, nothing the attacker does changes a bit."""
    victim, harmless = torch.randn(10, H), torch.randn(10, H)
    overflow = victim[-1:].expand(10, H).contiguous()
    options = {"top_k": 1, "capacity": Capacity(1.0, scope=scope)}
    layer = switchgear.MoE(H, I, E, **options).eval()
    same = torch.equal(attacked(layer, victim, harmless), attacked(layer, victim, overflow))
    assert same == (scope == "sequence")
    safe = layer_of(presets.batch_independent(top_k=1)).eval()
    safe.load_state_dict(layer.state_dict())
    assert torch.equal(attacked(safe, victim, harmless), attacked(safe, victim, overflow))
    plain = switchgear.MoE(H, I, E, top_k=1).eval()  # the default
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(attacked(plain, victim, harmless), attacked(plain, victim, overflow))


@pytest.mark.parametrize("drop", ["order", "choice", "score", "reverse"])
@pytest.mark.parametrize("overflow", ["drop", "reroute"])
def test_row79_buffer_overflow_isolated_routers_are_independent_bit_for_bit(drop: str, overflow: str) -> None:
    layer = switchgear.MoE(H, I, E, 2, capacity=Capacity(1.0, drop, overflow), isolation="sequence").eval()
    victim = torch.randn(12, H)
    wanted = attacked(layer, victim, torch.randn(12, H))
    for stranger in (torch.randn(12, H), torch.zeros(12, H), victim[-1:].expand(12, H)):
        assert torch.equal(attacked(layer, victim, stranger), wanted)


def test_row80_stealing_user_prompts_by_ties_needs_a_shared_batch(isa: str) -> None:
    """Expert choice over the batch takes one of two equal tokens. The attacker guesses the victim's token. If the guess
    is right, the one that is first in the batch is taken and the other is not, which the attacker sees in its own
    output."""
    select = ExpertChoice(tokens_per_expert=1)
    layer = switchgear.MoE(H, I, 2, select=select, score=lambda x, context: torch.stack((x[:, 0], -x[:, 0]), 1)).eval()
    prompt = torch.randn(4, H)
    prompt[:, 0] = torch.tensor([0.1, -0.2, 2.0, 0.3])  # expert 0 prefers the third token
    right, wrong = prompt[2:3], prompt[2:3].clone()
    wrong[0, 0] = 1.5

    def seen(layer: Any, guess: Tensor) -> bool:
        """Whether the attacker's token, after the victim's, got an output."""
        batch = torch.cat((prompt, guess, torch.zeros(3, H)))
        return bool(layer(batch.view(2, 4, H))[1, 0].any())

    higher = right.clone()
    higher[0, 0] = 2.5
    assert [seen(layer, guess) for guess in (wrong, right, higher)] == [False, False, True]
    first = torch.cat((right, torch.zeros(3, H), prompt)).view(2, 4, H)
    assert layer(first)[0, 0].any()  # before the victim's, an equal token wins
    assert not layer(first)[1, 2].any()  # and the victim's is dropped, so the guess was right

    safe = layer_of(presets.isolated_expert_choice(), score=lambda x, context: x[:, :E]).eval()

    def batch(guess: Tensor, prompt: Tensor) -> Tensor:
        return safe(torch.cat((guess, torch.zeros(3, H), prompt)).view(2, 4, H))

    for guess in (wrong, higher):
        assert torch.equal(batch(guess, prompt)[1], batch(right, prompt)[1])  # for any guess
    assert torch.equal(batch(right, prompt)[0], batch(right, torch.zeros(4, H))[0])  # and for any prompt of the victim


def test_row80_stealing_user_prompts_ties_follow_the_order_within_a_sequence() -> None:
    select, logits = ExpertChoice(1.0, scope="sequence", ties="index"), torch.zeros(12, 3)
    routing = select(logits, Context(sequence_length=6))
    kept = (routing.topk_ids >= 0).any(1).view(2, 6)
    assert kept.tolist() == [[True, True, False, False, False, False]] * 2
    swapped = select(logits, Context(sequence_ids=torch.tensor([1] * 6 + [0] * 6)))
    assert torch.equal(swapped.topk_ids, routing.topk_ids)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("factor", {"factor": 0.0}),
        ("factor", {"factor": math.nan}),
        ("evaluation_factor", {"evaluation_factor": -1.0}),
        ("drop", {"drop": "last"}),
        ("overflow", {"overflow": "queue"}),
        ("scope", {"scope": "token"}),
        ("expand", {"expand": 0.5}),
        ("expand", {"expand": math.inf}),
        ("minimum", {"minimum": -1}),
    ],
)
def test_bad_options_of_capacities_are_named(name: str, options: dict[str, Any]) -> None:
    with raises(ValueError, name):
        Capacity(**options)


@pytest.mark.parametrize("options", [{"factor": "a"}, {"evaluation_factor": "a"}, {"expand": "a"}, {"minimum": 2.5}])
def test_options_of_capacities_of_other_types_are_named(options: dict[str, Any]) -> None:
    with raises(TypeError, next(iter(options))):
        Capacity(**options)
