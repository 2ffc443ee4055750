# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import switchgear
from errors import raises
from switchgear import ops, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
U32 = torch.finfo(torch.float32).eps / 2

# (options, with a selection bias)
POLICIES: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({"normalize": True}, False),
    ({"score_function": "sigmoid"}, False),
    ({"score_function": "sigmoid", "normalize": True, "scale": 2.5}, True),  # DeepSeek-V3 without groups
    ({"num_groups": 4, "topk_groups": 2}, False),  # DeepSeek-V2
    ({"num_groups": 4, "topk_groups": 2, "group_score": "top2_sum"}, True),
    (
        {"score_function": "sigmoid", "num_groups": 4, "topk_groups": 3, "group_score": "top2_sum", "normalize": True},
        True,
    ),
]


def logits_of(kind: str, num_tokens: int, num_experts: int) -> Tensor:
    logits = torch.randn(num_tokens, num_experts)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-42, 0.0, -0.0, 88.8, -87.4])
    pick = special[torch.randint(len(special), logits.shape)]
    if kind == "non_finite":
        return torch.where(torch.rand_like(logits) < 0.4, pick, logits)
    if kind == "only_special":
        return pick
    if kind == "ties":
        return torch.randint(3, logits.shape).float()
    if kind == "equal":
        return torch.zeros_like(logits)
    return logits * {"normal": 1.0, "wide": 30.0}[kind]


KINDS = ("normal", "wide", "ties", "equal", "non_finite", "only_special")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_on_every_backend(backend: str, kind: str, dtype: torch.dtype) -> None:
    """Ids and weights are those of the reference bit for bit, for any logits."""
    for (options, biased), (num_experts, top_k) in itertools.product(POLICIES, ((8, 2), (60, 6), (64, 8), (12, 6))):
        logits = logits_of(kind, 40, num_experts).to(dtype)
        bias = logits_of("non_finite" if kind == "only_special" else "normal", 1, num_experts)[0] if biased else None
        routing = switchgear.route(logits, top_k, selection_bias=bias, **options)
        with switchgear.use_backend("reference"):
            wanted = switchgear.route(logits, top_k, selection_bias=bias, **options)
        assert torch.equal(routing.topk_ids, wanted.topk_ids)
        assert torch.equal(routing.topk_weights.view(torch.int32), wanted.topk_weights.view(torch.int32))
        assert routing.topk_weights.isfinite().all()
        ids = routing.topk_ids.tolist()
        assert all(len(set(row)) == top_k and set(row) <= set(range(num_experts)) for row in ids)


def test_exponential() -> None:
    """exp of the reference in float32: within an ulp of the true value, and exact where it must be."""
    x = torch.cat((torch.linspace(-87.3, 88.7, 200_001), torch.randn(100_000)))
    relative = (reference.exp(x).double() / torch.exp(x.double()) - 1).abs()
    assert float(relative.max()) < 2 * U32
    special = torch.tensor([0.0, -0.0, -88.0, -torch.inf, torch.inf, 89.0, torch.finfo(torch.float32).min])
    assert reference.exp(special).tolist() == [1.0, 1.0, 0.0, 0.0, torch.inf, torch.inf, 0.0]


def test_scores_against_float64(backend: str) -> None:
    """float32 weights near those of float64: exp and the rounding of its argument m - l, a sum, a quotient."""
    logits = 3 * torch.randn(50, 32)
    for options in ({}, {"normalize": True}, {"score_function": "sigmoid"}):
        routing, wanted = switchgear.route(logits, 5, **options), switchgear.route(logits.double(), 5, **options)
        assert torch.equal(routing.topk_ids, wanted.topk_ids)
        relative = (routing.topk_weights / wanted.topk_weights - 1).abs()
        spread = float(logits.amax() - logits.amin())
        assert float(relative.max()) < 2 * U32 * (spread + 6)


def test_definitions() -> None:
    """The policies as their papers and Hugging Face define them, on logits without ties."""
    logits = torch.randn(30, 16, dtype=torch.float64)
    probabilities = logits.softmax(-1)
    values, ids = probabilities.topk(4)
    plain = switchgear.route(logits, 4)
    assert torch.equal(plain.topk_ids, ids.int())
    torch.testing.assert_close(plain.topk_weights, values)
    mixtral = switchgear.route(logits, 4, normalize=True)
    torch.testing.assert_close(mixtral.topk_weights, values / values.sum(-1, keepdim=True))

    bias = torch.randn(16)
    scores = logits.sigmoid()
    choice = scores + bias
    groups = choice.view(30, 4, 4).topk(2).values.sum(-1).topk(2).indices
    allowed = torch.zeros(30, 4).scatter(1, groups, 1).bool().repeat_interleave(4, 1)
    ids = choice.masked_fill(~allowed, -math.inf).topk(4).indices
    weights = scores.gather(1, ids)
    deepseek = switchgear.route(
        logits, 4, score_function="sigmoid", normalize=True, scale=2.5, selection_bias=bias,
        num_groups=4, topk_groups=2, group_score="top2_sum",
    )  # fmt: skip
    assert torch.equal(deepseek.topk_ids, ids.int())
    torch.testing.assert_close(deepseek.topk_weights, 2.5 * weights / weights.sum(-1, keepdim=True))


def test_a_closed_expert_does_not_close_its_group(backend: str) -> None:
    logits = torch.randn(30, 8)
    bias = torch.zeros(8)
    bias[[2, 4, 5]] = -math.inf  # of the groups of two one is half open, one closed
    scores = logits.sigmoid()
    ranks = torch.where(bias.isinf(), 0, scores).view(30, 4, 2).sum(-1)
    ranks[:, 2] = -1
    allowed = torch.zeros(30, 4).scatter(1, ranks.topk(2).indices, 1).bool().repeat_interleave(2, 1)
    wanted = (scores + bias).masked_fill(~allowed, -math.inf).topk(2).indices
    found = switchgear.route(
        logits, 2, score_function="sigmoid", selection_bias=bias, num_groups=4, topk_groups=2, group_score="top2_sum"
    )
    assert torch.equal(found.topk_ids, wanted.int())
    assert (found.topk_ids == 3).any()


@given(st.data())
def test_total_order(backend: str, data: st.DataObject) -> None:
    """Value descending, then id ascending; NaN and -Inf after every finite number, +Inf before."""
    num_experts = data.draw(st.integers(1, 12))
    top_k = data.draw(st.integers(1, num_experts))
    value = st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, math.nan, math.inf, -math.inf, 3.4e38]), st.floats(width=32, allow_nan=False)
    )
    row = data.draw(st.lists(value, min_size=num_experts, max_size=num_experts))
    largest = torch.finfo(torch.float32).max
    ranked = [-largest if math.isnan(v) else min(max(v, -largest), largest) for v in row]
    wanted = sorted(range(num_experts), key=lambda e: (-ranked[e], e))[:top_k]
    assert switchgear.route(torch.tensor([row]), top_k).topk_ids.tolist() == [wanted]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: "-".join(map(str, policy[0].values())) or "plain")
def test_gradients(backend: str, policy: tuple[dict[str, Any], bool]) -> None:
    """Float32 gradients against the float64 reference for the same choice. Everything but the scores is float64 in
    both, so the error is that of a score (see above), times the terms it enters, and one rounding."""
    options, biased = policy
    logits = torch.randn(20, 16, requires_grad=True)
    bias = torch.randn(16) if biased else None
    routing = switchgear.route(logits, 4, selection_bias=bias, **options)
    grad = torch.randn(20, 4)
    routing.topk_weights.backward(grad)
    keywords = {"score_function": "softmax", "normalize": False, "scale": 1.0, **options}
    args = tuple(keywords[name] for name in ("score_function", "normalize", "scale"))
    wanted = reference.route_backward(grad.double(), logits.detach().double(), routing.topk_ids, *args)
    scale = keywords["scale"] * grad.abs().sum(-1, keepdim=True).double()
    assert bool(
        ((logits.grad - wanted).abs() <= 2 * U32 * (float(logits.detach().abs().max()) * 2 + 6) * 4 * scale).all()
    )
    exact = reference.route_backward(grad, logits.detach(), routing.topk_ids, *args)
    torch.testing.assert_close(
        logits.grad, exact, rtol=2 * U32, atol=1e-12
    )  # the same float64 sums: one rounding apart


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: "-".join(map(str, policy[0].values())) or "plain")
def test_gradcheck(policy: tuple[dict[str, Any], bool]) -> None:
    options, biased = policy
    logits = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8) if biased else None
    assert torch.autograd.gradcheck(
        lambda logits: switchgear.route(logits, 3, selection_bias=bias, **options).topk_weights, (logits,)
    )


def test_non_finite_logits_get_no_gradient(backend: str) -> None:
    logits = torch.tensor([[torch.nan, 1.0, torch.inf, 0.5], [torch.nan] * 4], requires_grad=True)
    switchgear.route(logits, 2, normalize=True).topk_weights.sum().backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[~logits.isfinite()].any()


def test_shapes(backend: str) -> None:
    routing = switchgear.route(torch.randn(2, 3, 8), 2)
    assert routing.topk_ids.shape == routing.topk_weights.shape == (6, 2)
    assert routing.router_logits.shape == (6, 8)
    assert routing.num_experts == 8
    assert routing.topk_ids.dtype == torch.int32
    assert routing.topk_weights.dtype == torch.float32
    assert switchgear.route(torch.zeros(0, 8), 2).topk_ids.shape == (0, 2)
    assert switchgear.route(torch.randn(8, 5).t(), 2).topk_ids.shape == (5, 2)
    assert switchgear.route(torch.randn(4, 3), 3).topk_ids.sort(-1).values.tolist() == [[0, 1, 2]] * 4
    with torch.no_grad():
        ids, _ = ops.route(torch.randn(4, 3).double(), None, 1, "softmax", False, 1.0, 1, 1, "max")
    assert ids.dtype == torch.int32


@pytest.mark.parametrize("dynamic", [False, True])
def test_llama4_ranks_logits_whose_sigmoids_are_equal(backend: str, dynamic: bool) -> None:
    logits = torch.tensor([[14.0, 14.0625], [20.0, 30.0]])
    if dynamic:
        routing = switchgear.functional.route_dynamic(logits, max_experts=1, score_function="sigmoid")
    else:
        routing = switchgear.route(logits, 1, score_function="sigmoid")
    assert routing.topk_ids.tolist() == [[1], [1]]
    torch.testing.assert_close(routing.topk_weights, logits[:, 1:].sigmoid())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_k": 9}, ValueError, "top_k"),
        ({"score_function": "linear"}, ValueError, "score_function"),
        ({"group_score": "mean"}, ValueError, "group_score"),
        ({"num_groups": 3}, ValueError, "num_groups"),
        ({"num_groups": 0}, ValueError, "num_groups"),
        ({"num_groups": 4, "topk_groups": 5}, ValueError, "topk_groups"),
        ({"num_groups": 4, "topk_groups": 1, "top_k": 3}, ValueError, "top_k"),
        ({"scale": math.inf}, ValueError, "scale"),
        ({"selection_bias": torch.zeros(7)}, ValueError, "selection_bias"),
        ({"selection_bias": torch.zeros(8, dtype=torch.int32)}, TypeError, "selection_bias"),
        ({"router_logits": torch.zeros(4, 8, dtype=torch.int64)}, TypeError, "router_logits"),
        ({"router_logits": torch.zeros(1, 8).expand(2**40, 8)}, ValueError, "router_logits"),  # needs no memory itself
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_errors(backend: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    keywords = {"router_logits": torch.zeros(4, 8), "top_k": 2, **changes}
    with raises(error, message):
        switchgear.route(**keywords)
