# SPDX-License-Identifier: BSD-3-Clause
"""The ops of routing policies: against their definitions in a few lines of Python, and with the same bits on every
backend, for any values."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import switchgear
from errors import raises
from switchgear import ops, reference
from switchgear.functional import route_dynamic
from test_route import KINDS, logits_of

pytestmark = pytest.mark.in_turns(on=["simt"])

SHAPES = ((1, 1), (7, 3), (40, 8), (33, 17), (64, 60))  # T, E
SEQUENCES = ("one", "in order", "mixed", "some empty")


def sequences(kind: str, num_tokens: int) -> tuple[Tensor | None, int]:
    if kind == "one":
        return None, 1
    if kind == "in order":
        return (torch.arange(num_tokens) * 3 // max(num_tokens, 1)).int(), 3
    count = 4 if kind == "mixed" else 9
    return torch.randint(4, (num_tokens,), dtype=torch.int32), count


def sane(values: Tensor) -> list[Any]:
    rows: list[Any] = reference.sanitize(values.float()).tolist()
    return rows


_answers: dict[tuple[Any, ...], Any] = {}


def on_reference(op: str, *args: Any) -> Any:
    """Computed once for all backends, which get the same arguments."""

    def content(arg: Any) -> Any:
        if not isinstance(arg, torch.Tensor):
            return arg
        return arg.dtype, arg.shape, arg.contiguous().view(torch.uint8).numpy().tobytes()

    key = (op, *map(content, args))
    if key not in _answers:
        _answers[key] = getattr(reference.policies, op)(*args)
    return _answers[key]


# ---- column_topk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", SEQUENCES)
def test_column_topk(backend: str, kind: str, order: str) -> None:
    """Each column's best tokens in each sequence: value descending, token ascending."""
    for (num_tokens, num_experts), dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        values = logits_of(kind, num_tokens, num_experts).to(dtype)
        sequence_ids, count = sequences(order, num_tokens)
        limits = torch.randint(0, 2 * num_tokens // count + 2, (count,), dtype=torch.int32)
        ids = ops.column_topk(values, sequence_ids, limits)
        owner = [0] * num_tokens if sequence_ids is None else sequence_ids.tolist()
        table = sane(values)
        wanted: list[list[int]] = [[] for _ in range(num_tokens)]
        for expert, sequence in itertools.product(range(num_experts), range(count)):
            members = sorted(
                (t for t in range(num_tokens) if owner[t] == sequence), key=lambda t: (-table[t][expert], t)
            )
            for token in members[: int(limits[sequence])]:
                wanted[token].append(expert)
        assert ids.tolist() == [row + [-1] * (num_experts - len(row)) for row in wanted]
        assert ids.dtype == torch.int32


def test_column_topk_of_long_columns(backend: str) -> None:
    """Thousands of tokens: histograms with many values per bin, and ties across it."""
    values = torch.randn(3000, 20).softmax(-1)
    values[::3] = values[1::3]
    for scale in (1.0, 1e-3):
        rounded = (values / scale).round() * scale if scale < 1 else values
        limits = torch.tensor([700], dtype=torch.int32)
        ids = ops.column_topk(rounded, None, limits)
        assert torch.equal(ids, on_reference("column_topk", rounded, None, limits))
        assert torch.equal(torch.bincount(ids[ids >= 0], minlength=20), torch.full((20,), 700))


# ---- route_dynamic ---------------------------------------------------------------------------------------------------

DYNAMIC: tuple[dict[str, Any], ...] = (
    {"top_p": 0.4},
    {"top_p": 0.0},
    {"top_p": 1.0},
    {"top_p": 0.9, "normalize": True, "scale": 2.5},
    {"top_p": 0.7, "max_experts": 3},
    {"threshold": 0.1},
    {"threshold": 0.5, "score_function": "sigmoid", "min_experts": 0},
    {"threshold": 0.6, "score_function": "sigmoid", "min_experts": 2, "max_experts": 5, "normalize": True},
    {"threshold": 0.05, "top_p": 0.8},
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", DYNAMIC, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
@pytest.mark.parametrize("biased", [False, True])
def test_route_dynamic(backend: str, kind: str, options: dict[str, Any], biased: bool) -> None:
    """The best experts one after another until the mass is reached; same bits as the reference."""
    for num_experts in (8, 17, 64):
        logits = logits_of(kind, 30, num_experts)
        bias = logits_of("normal", 1, num_experts)[0] if biased else None
        routing = route_dynamic(logits, selection_bias=bias, **options)
        with switchgear.use_backend("reference"):
            wanted = route_dynamic(logits, selection_bias=bias, **options)
        assert torch.equal(routing.topk_ids, wanted.topk_ids)
        assert torch.equal(routing.topk_weights.view(torch.int32), wanted.topk_weights.view(torch.int32))

        function = options.get("score_function", "softmax")
        most = options.get("max_experts", num_experts)
        everyone = switchgear.route(logits, num_experts, score_function=function, selection_bias=bias)
        top_p = math.inf if options.get("top_p", 1) >= 1 else options["top_p"]
        threshold = float(torch.tensor(options.get("threshold", 0.0)))
        for ids, weights, got in zip(
            everyone.topk_ids.tolist(), everyone.topk_weights.tolist(), routing.topk_ids.tolist(), strict=True
        ):
            chosen, mass = [], 0.0
            for rank, (expert, weight) in enumerate(zip(ids, weights, strict=True)):
                needed = rank < options.get("min_experts", 1)
                if rank < most and (needed or (mass < top_p and weight >= threshold)):
                    chosen.append(expert)
                mass += weight
            assert got == chosen + [-1] * (most - len(chosen))


def test_route_dynamic_gradients(backend: str) -> None:
    """For the same choice, those of a softmax or sigmoid that autograd differentiates in float64."""
    for options in DYNAMIC:
        logits = torch.randn(20, 16, requires_grad=True)
        routing = route_dynamic(logits, **options)
        grad = torch.randn_like(routing.topk_weights)
        routing.topk_weights.backward(grad)
        wide = logits.detach().double().requires_grad_()
        scores = wide.softmax(-1) if options.get("score_function") != "sigmoid" else wide.sigmoid()
        weights = scores.gather(1, routing.topk_ids.clamp(min=0).long()).masked_fill(routing.topk_ids < 0, 0)
        if options.get("normalize"):
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        (weights * options.get("scale", 1.0)).backward(grad.double())
        torch.testing.assert_close(logits.grad, wide.grad.float(), rtol=1e-5, atol=1e-6)


def test_route_dynamic_gradcheck() -> None:
    logits = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    for options in ({"top_p": 0.6}, {"top_p": 0.9, "normalize": True}, {"threshold": 0.1, "min_experts": 0}):
        assert torch.autograd.gradcheck(lambda x, o=options: route_dynamic(x, **o).topk_weights, (logits,))


# ---- fit_capacity ----------------------------------------------------------------------------------------------------


def fitted(
    ids: list[list[int]], priorities: Any, scores: Any, owner: list[int], limits: list[int], drop: str, rounds: int
) -> list[list[int]]:
    """The definition, one offer at a time."""
    num_tokens, top_k = len(ids), len(ids[0])
    precedence = {
        "order": lambda t, k: (t, k),
        "reverse": lambda t, k: (-t, -k),
        "choice": lambda t, k: (k, t),
        "priority": lambda t, k: (-priorities[t][k], t, k),
    }[drop]
    taken: dict[tuple[int, int], int] = {}
    kept = [[-1] * top_k for _ in ids]

    def offer(offers: list[tuple[int, int, int]]) -> None:
        for t, k, expert in sorted(offers, key=lambda o: precedence(o[0], o[1])):
            if taken.get((owner[t], expert), 0) < limits[owner[t]]:
                taken[owner[t], expert] = taken.get((owner[t], expert), 0) + 1
                kept[t][k] = expert

    offer([(t, k, e) for t, row in enumerate(ids) for k, e in enumerate(row) if e >= 0])
    if scores is None:
        return kept
    others = [
        [
            e
            for e in sorted(range(len(scores[t])), key=lambda e: (-scores[t][e], e))
            if e not in ids[t] and scores[t][e] > 0
        ]
        for t in range(num_tokens)
    ]
    for r in range(rounds):
        lost = [next((k for k in range(top_k) if ids[t][k] >= 0 > kept[t][k]), None) for t in range(num_tokens)]
        offer([(t, k, others[t][r]) for t, k in enumerate(lost) if k is not None and r < len(others[t])])
    return kept


@pytest.mark.parametrize("drop", reference.DROPS)
@pytest.mark.parametrize("order", SEQUENCES)
@pytest.mark.parametrize("reroute", [False, True], ids=["drop", "reroute"])
@pytest.mark.parametrize("kind", ["normal", "ties", "only_special"])
def test_fit_capacity(backend: str, drop: str, order: str, reroute: bool, kind: str) -> None:
    for num_tokens, num_experts, top_k in ((1, 1, 1), (9, 4, 2), (40, 8, 3), (50, 17, 4)):
        scores = logits_of(kind, num_tokens, num_experts)
        ids = switchgear.route(scores * 3, top_k).topk_ids
        ids = ids.masked_fill(torch.rand(ids.shape) < 0.1, -1)
        priorities = logits_of(kind, num_tokens, top_k)
        sequence_ids, count = sequences(order, num_tokens)
        average = num_tokens * top_k / num_experts / count
        limits = torch.randint(0, math.ceil(2 * average) + 1, (count,), dtype=torch.int32)
        candidates = num_experts - 1 if num_experts > 8 else num_experts
        kept = ops.fit_capacity(
            ids, priorities, scores if reroute else None, sequence_ids, limits, num_experts, drop, candidates
        )
        owner = [0] * num_tokens if sequence_ids is None else sequence_ids.tolist()
        wanted = fitted(
            ids.tolist(), sane(priorities), sane(scores) if reroute else None, owner, limits.tolist(), drop,
            candidates - top_k,
        )  # fmt: skip
        assert kept.tolist() == wanted
        for row in wanted:
            assert len({e for e in row if e >= 0}) == sum(e >= 0 for e in row)  # a token is on an expert at most once


def test_rerouting_of_608_experts(backend: str) -> None:
    """Between the limit of a CUDA launch's dynamic shared memory and the same less the kernel's static arrays."""
    scores = torch.rand(12, 608)
    ids = torch.randint(608, (12, 1)).int() // 300
    limits = torch.tensor([2], dtype=torch.int32)
    kept = ops.fit_capacity(ids, None, scores, None, limits, 608, "order", 3)
    assert kept.tolist() == fitted(ids.tolist(), None, scores.tolist(), [0] * 12, [2], "order", 2)


def test_fit_capacity_keeps_duplicates_apart(backend: str) -> None:
    """A token that chose one expert twice takes two places."""
    ids = torch.tensor([[1, 1], [1, 0], [0, -1]], dtype=torch.int32)
    limits = torch.tensor([2], dtype=torch.int32)
    assert ops.fit_capacity(ids, None, None, None, limits, 2, "order", 0).tolist() == [[1, 1], [-1, 0], [0, -1]]


# ---- assign_balanced -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", SEQUENCES)
@pytest.mark.parametrize("eps", [-1.0, 1e-3])
@pytest.mark.some(24)
def test_assign_balanced_is_balanced(backend: str, kind: str, order: str, eps: float) -> None:
    most = 15 if backend == "simt" else 200  # some kinds need all iterations
    for (num_tokens, num_experts), iterations in itertools.product(SHAPES, (0, 1, 5, most)):
        values = logits_of(kind, num_tokens, num_experts)
        sequence_ids, count = sequences(order, num_tokens)
        expert = ops.assign_balanced(values, sequence_ids, count, eps, iterations)
        assert torch.equal(expert, on_reference("assign_balanced", values, sequence_ids, count, eps, iterations))
        owner = torch.zeros(num_tokens, dtype=torch.int32) if sequence_ids is None else sequence_ids
        for sequence in range(count):
            size = int((owner == sequence).sum())
            loads = torch.bincount(expert[owner == sequence].long(), minlength=num_experts)
            assert loads.tolist() == [size // num_experts + (e < size % num_experts) for e in range(num_experts)]


def test_assign_balanced_of_550_experts(backend: str) -> None:
    """Between the limit of a CUDA launch's dynamic shared memory and the same less the kernel's static arrays."""
    values = torch.randn(20, 550)
    expert = ops.assign_balanced(values, None, 1, -1.0, 2)
    assert torch.equal(expert, on_reference("assign_balanced", values, None, 1, -1.0, 2))


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(64, 8), (96, 12), (130, 16), (512, 16)])
def test_assign_balanced_is_near_the_best(backend: str, num_tokens: int, num_experts: int) -> None:
    """Within T·eps of scipy's optimum, if the auction has ended."""
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    values = torch.randn(num_tokens, num_experts)
    expert = ops.assign_balanced(values, None, 1, 1e-2, 100_000).long()
    places = [e for e in range(num_experts) for _ in range(num_tokens // num_experts + (e < num_tokens % num_experts))]
    rows, columns = optimize.linear_sum_assignment(-values[:, places].numpy())
    best = float(values[:, places].numpy()[rows, columns].sum())
    total = float(values.gather(1, expert[:, None]).sum())
    assert best - num_tokens * 1e-2 - 1e-3 <= total <= best + 1e-3


# ---- assign_capped ---------------------------------------------------------------------------------------------------


def capped_limits(sequence_ids: Tensor | None, count: int, num_tokens: int, num_experts: int, each: int) -> Tensor:
    owner = torch.zeros(num_tokens, dtype=torch.int64) if sequence_ids is None else sequence_ids.long()
    return (torch.bincount(owner, minlength=count) * each // num_experts).clamp(min=1).int()


@pytest.mark.parametrize("order", SEQUENCES)
@pytest.mark.parametrize("entropy", [1.0, 1e-2, 1e-3])
@pytest.mark.some(10)
def test_assign_capped_against_float64(backend: str, order: str, entropy: float) -> None:
    """A round subtracts the charges of experts and tokens from numbers of about 1 / entropy, and recomputes both: four
    roundings to float32. A price moves no more than the values it is computed from, so errors only add up."""
    rounds = 10
    for (num_tokens, num_experts), cap in itertools.product((*SHAPES, (700, 16)), (1, 3, 6)):
        values = (torch.randn(num_tokens, num_experts) * 2).softmax(-1)
        sequence_ids, count = sequences(order, num_tokens)
        limits = capped_limits(sequence_ids, count, num_tokens, num_experts, min(cap, num_experts))
        assignment = ops.assign_capped(values, sequence_ids, limits, cap, entropy, rounds)
        wanted = on_reference("assign_capped", values.double(), sequence_ids, limits, cap, entropy, rounds)
        assert assignment.dtype == torch.float32
        assert wanted.dtype == torch.float64
        largest = max(float(wanted.abs().max()), 1 / entropy)
        torch.testing.assert_close(assignment.double(), wanted, rtol=0, atol=4 * (rounds + 1) * largest * 2**-24)


def test_assign_capped_fills_experts(backend: str) -> None:
    """The last update is that of experts, so each has its limit, up to the precision of exp of a float32 near 1 / λ."""
    values, limits = (torch.randn(600, 20) * 2).softmax(-1), torch.tensor([90], dtype=torch.int32)
    assignment = ops.assign_capped(values, None, limits, 4, 1e-3, 30)
    columns = assignment.double().exp().clamp(max=1).sum(0)
    torch.testing.assert_close(columns, torch.full_like(columns, 90), rtol=1000 * 2**-23, atol=0)
    assert float(assignment.double().exp().clamp(max=1).sum(1).max()) < 4.5


def charge_by_bisection(values: Tensor, total: float) -> Tensor:
    """c [...,1] such that Σ min(1, exp(values - c)) over the last dimension is `total`."""
    low = values.amin(-1, keepdim=True) - 1
    high = values.amax(-1, keepdim=True) + math.log(values.shape[-1] / total) + 1
    for _ in range(80):
        middle = (low + high) / 2
        has_more = (values - middle).clamp(max=0).exp().sum(-1, keepdim=True) >= total
        low, high = torch.where(has_more, middle, low), torch.where(has_more, high, middle)
    return low


def rounds_to_settle(worth: Tensor, each: int, cap: int, tolerance: float) -> int:
    """The first round that moves the charges of tokens by at most `tolerance`, for the S / λ of one sequence."""
    of_token = torch.zeros_like(worth[:, :1])
    for done in itertools.count(1):
        of_expert = charge_by_bisection((worth - of_token).T, each).T
        last, of_token = of_token, charge_by_bisection(worth - of_expert, cap).clamp(min=0)
        move = float((of_token - last).abs().max())
        assert abs(move - tolerance) > 1e-2 * tolerance, "too close for float32"
        if move <= tolerance:
            return done
    raise AssertionError


def test_assign_capped_stops_by_sequence(backend: str) -> None:
    """Each sequence stops when it has settled, for as many rounds as alone, and not earlier or later."""
    torch.manual_seed(0)
    sizes, cap, entropy, tolerance, most = (40, 24, 31), 2, 1e-2, 0.05, 100
    sequence_ids = torch.arange(3).repeat_interleave(torch.tensor(sizes))[torch.randperm(sum(sizes))].int()
    limits = torch.tensor([9, 5, 3], dtype=torch.int32)
    alike = torch.tensor([2.0, 1.0, 0.0])[sequence_ids.long()][:, None]  # experts that want the same tokens
    values = (torch.randn(len(sequence_ids), 8) + alike * torch.randn(len(sequence_ids), 1)).softmax(-1)
    got = ops.assign_capped(values, sequence_ids, limits, cap, entropy, most, tolerance)
    rounds = []
    for b in range(3):
        rows = sequence_ids == b
        rounds.append(rounds_to_settle(values[rows].double() / entropy, int(limits[b]), cap, tolerance))
        fixed = ops.assign_capped(values, sequence_ids, limits, cap, entropy, rounds[-1])
        assert torch.equal(got[rows], fixed[rows])
        longer = ops.assign_capped(values, sequence_ids, limits, cap, entropy, rounds[-1] + 1)
        assert b == 2 or not torch.equal(got[rows], longer[rows])  # the last has room, and settles exactly
        alone = ops.assign_capped(values[rows], None, limits[b : b + 1], cap, entropy, most, tolerance)
        if backend != "reference":  # which sums as torch does
            assert torch.equal(got[rows], alone)
        torch.testing.assert_close(got[rows], alone)
    assert len(set(rounds)) == 3
    assert max(rounds) < most


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", SEQUENCES)
def test_assign_capped_of_any_values(backend: str, kind: str, order: str) -> None:
    """Numbers for any bits, and equal results for equal tokens."""
    for num_tokens, num_experts in SHAPES:
        values = logits_of(kind, num_tokens, num_experts)
        sequence_ids, count = sequences(order, num_tokens)
        limits = torch.randint(0, num_tokens + 3, (count,), dtype=torch.int32)
        assignment = ops.assign_capped(values, sequence_ids, limits, 2, 1e-3, 5)
        assert assignment.shape == values.shape
        assert not assignment.isnan().any()


def test_assign_capped_without_a_cap(backend: str) -> None:
    values, limits = torch.randn(33, 17), torch.tensor([4], dtype=torch.int32)
    for cap in (17, 18):
        assert torch.equal(ops.assign_capped(values, None, limits, cap, 0.25, 5), values * 4)


# ---- all -------------------------------------------------------------------------------------------------------------


def test_the_largest_limit(backend: str) -> None:
    """2^31 - 1 limits nothing."""
    values, most = logits_of("normal", 7, 4), torch.tensor([2**31 - 1], dtype=torch.int32)
    same = torch.tensor([7], dtype=torch.int32)
    ids = switchgear.route(values, 2).topk_ids
    assert torch.equal(ops.fit_capacity(ids, None, None, None, most, 4, "order", 0), ids)
    for op, options in (("column_topk", ()), ("assign_capped", (2, 1e-2, 10))):
        one, other = (getattr(ops, op)(values, None, limits, *options) for limits in (most, same))
        assert torch.equal(one, other), op


def test_no_tokens(backend: str) -> None:
    none, limits = torch.zeros(0, 4), torch.tensor([3], dtype=torch.int32)
    ids = torch.zeros(0, 2, dtype=torch.int32)
    assert ops.column_topk(none, None, limits).shape == (0, 4)
    assert route_dynamic(none, top_p=0.4).topk_ids.shape == (0, 4)
    assert ops.fit_capacity(ids, None, None, None, limits, 4, "order", 0).shape == (0, 2)
    assert ops.assign_balanced(none, None, 1, -1.0, 10).shape == (0,)
    assert ops.assign_capped(none, None, limits, 2, 1e-3, 10).shape == (0, 4)


@pytest.mark.checks_values
@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        ("column_topk", {"limits": [-1]}, "limits"),
        ("column_topk", {"sequence_ids": [0, 1, 0, 0]}, "sequence_ids"),
        ("column_topk", {"sequence_ids": [0, -1, 0, 0]}, "sequence_ids"),
        ("column_topk", {"sequence_ids": [0, 0, 0]}, "sequence_ids"),
        ("fit_capacity", {"limits": [-1]}, "limits"),
        ("fit_capacity", {"topk_ids": [[8, 0]] * 4}, "topk_ids"),
        ("fit_capacity", {"drop": "last"}, "drop"),
        ("fit_capacity", {"drop": "priority", "priorities": None}, "priorities"),
        ("fit_capacity", {"num_experts": 7}, "scores"),
        ("assign_balanced", {"num_sequences": 0}, "num_sequences"),
        ("assign_balanced", {"max_iterations": -1}, "max_iterations"),
        ("assign_balanced", {"sequence_ids": [0, 1, 0, 0]}, "sequence_ids"),
        ("assign_balanced", {"eps": math.nan}, "eps"),
        ("assign_capped", {"limits": [-1]}, "limits"),
        ("assign_capped", {"sequence_ids": [0, 1, 0, 0]}, "sequence_ids"),
        ("assign_capped", {"cap": 0}, "cap"),
        ("assign_capped", {"entropy": 0.0}, "entropy"),
        ("assign_capped", {"entropy": math.inf}, "entropy"),
        ("assign_capped", {"iterations": -1}, "iterations"),
        ("assign_capped", {"tolerance": math.nan}, "tolerance"),
        ("route_dynamic", {"max_experts": 9}, "max_experts"),
        ("route_dynamic", {"min_experts": 9}, "min_experts"),
        ("route_dynamic", {"top_p": -0.1}, "top_p"),
        ("route_dynamic", {"threshold": math.nan}, "threshold"),
        ("route_dynamic", {"score_function": "relu"}, "score_function"),
    ],
    ids=str,
)
def test_errors(backend: str, op: str, changes: dict[str, Any], message: str) -> None:
    good: dict[str, dict[str, Any]] = {
        "column_topk": {"values": torch.zeros(4, 8), "sequence_ids": None, "limits": [1]},
        "fit_capacity": {
            "topk_ids": [[0, 1]] * 4, "priorities": torch.zeros(4, 2), "scores": torch.zeros(4, 8),
            "sequence_ids": None, "limits": [1], "num_experts": 8, "drop": "order", "candidates": 8,
        },
        "assign_balanced": {
            "values": torch.zeros(4, 8), "sequence_ids": None, "num_sequences": 1, "eps": -1.0, "max_iterations": 9,
        },
        "assign_capped": {
            "values": torch.zeros(4, 8), "sequence_ids": None, "limits": [1], "cap": 2, "entropy": 1e-3,
            "iterations": 3,
        },
        "route_dynamic": {
            "router_logits": torch.zeros(4, 8), "selection_bias": None, "max_experts": 8, "min_experts": 1,
            "score_function": "softmax", "top_p": 0.4, "threshold": 0.0, "normalize": False, "scale": 1.0,
        },
    }  # fmt: skip
    args = {**good[op], **changes}
    args = {n: torch.tensor(v, dtype=torch.int32) if isinstance(v, list) else v for n, v in args.items()}
    with raises(ValueError, message):
        getattr(ops, op)(*args.values())


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_change_nothing(isa: str, threads: int) -> None:
    logits = logits_of("ties", 700, 60) + (torch.rand(700, 60) < 0.1) * torch.randn(700, 60)
    sequence_ids, count = sequences("mixed", 700)
    limits = torch.full((count,), 20, dtype=torch.int32)
    ids = switchgear.route(logits, 6).topk_ids

    def results() -> list[Tensor]:
        return [
            ops.column_topk(logits, sequence_ids, limits),
            *route_dynamic(logits, top_p=0.5)[:2],
            ops.fit_capacity(ids, None, logits, sequence_ids, limits, 60, "choice", 60),
            ops.assign_balanced(logits, sequence_ids, count, -1.0, 50),
            ops.assign_capped(logits, sequence_ids, limits, 3, 1e-2, 10),
        ]

    wanted = results()
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(results(), wanted, strict=True))
