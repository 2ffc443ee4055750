# SPDX-License-Identifier: BSD-3-Clause
"""route is total: any bits in the logits give K distinct experts in range, ordered by (value descending, id ascending),
with the same bits on every backend. This prevents the most common chain of crashes in MoE serving: a padding row gives
NaN logits, these give duplicate or wild ids, and these give out-of-bounds writes."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from problems import DTYPES, counts, equal_bits
from torch import Tensor

import switchgear
from switchgear import ops, reference

NUM_EXPERTS, TOP_K = 60, 6
SPECIALS = np.array([np.nan, -np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 0.0, -0.0, 1e-40, -1e-40], np.float32)


def drawn_rows(kind: str, rng: np.random.Generator, rows: int) -> np.ndarray:
    shape = (rows, NUM_EXPERTS)
    normal = (rng.standard_normal(shape) * 3).astype(np.float32)
    match kind:
        case "mixed":
            return np.where(rng.random(shape) < 0.3, rng.choice(SPECIALS, shape), normal)
        case "nothing finite":
            return rng.choice(SPECIALS[:4], shape)
        case "one finite":
            return np.where(np.arange(NUM_EXPERTS) == rng.integers(NUM_EXPERTS, size=(rows, 1)), normal, SPECIALS[0])
        case "few values":
            values = rng.choice(SPECIALS, (rows, 3)) if rng.integers(2) else normal[:, :3]
            return np.take_along_axis(values, rng.integers(0, 3, shape), 1)
        case "equal":
            return np.repeat(rng.choice(np.append(SPECIALS, 1.5), (rows, 1)), NUM_EXPERTS, 1)
        case "subnormal":
            return (normal * 1e-40).astype(np.float32)
        case "huge":
            return (normal.astype(np.float64) * 1e38).clip(-3.4e38, 3.4e38).astype(np.float32)
        case _:  # any bits
            return rng.integers(0, 2**32, shape, np.uint32).view(np.float32)


KINDS = ("mixed", "nothing finite", "one finite", "few values", "equal", "subnormal", "huge", "any bits")
GROUPED = {"num_groups": 6, "topk_groups": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {"normalize": True},
    "sigmoid": {"score_function": "sigmoid", "scale": 2.5},
    "softmax in groups": {**GROUPED, "group_score": "max"},
    "sigmoid in groups, biased": {**GROUPED, "score_function": "sigmoid", "group_score": "top2_sum", "normalize": True},
    "softmax, biased": {"normalize": True},
}


@functools.cache
def case(kind: str, name: str, dtype: torch.dtype, count: int) -> tuple[Tensor, dict[str, Any], switchgear.Routing]:
    """Logits, options, and the reference's routing."""
    rng = np.random.default_rng([8, KINDS.index(kind), list(OPTIONS).index(name), DTYPES.index(dtype)])
    logits = torch.from_numpy(drawn_rows(kind, rng, count)).to(dtype)
    bias = None
    if "biased" in name:
        bias = torch.from_numpy(np.where(rng.random(NUM_EXPERTS) < 0.2, rng.choice(SPECIALS, NUM_EXPERTS), 0.25))
    options = {"selection_bias": None if bias is None else bias.float(), **OPTIONS[name]}
    with switchgear.use_backend("reference"):
        return logits, options, switchgear.route(logits, TOP_K, **options)


def sanitised(values: Tensor) -> np.ndarray:
    values = values.float().numpy()
    lowest, highest = np.finfo(np.float32).min, np.finfo(np.float32).max
    return np.clip(np.where(np.isnan(values), lowest, values), lowest, highest)


def ranked(values: np.ndarray) -> np.ndarray:
    """Indices along the last axis by (value descending, index ascending); -0 equals 0."""
    return np.argsort(-(values + 0.0), axis=-1, kind="stable")


def chosen(logits: Tensor, options: dict[str, Any]) -> np.ndarray:
    """The definition of the choice in numpy, from the reference's scores."""
    values = sanitised(logits)
    score = reference.scores(torch.from_numpy(values), options.get("score_function", "softmax")).numpy()
    bias, groups = options["selection_bias"], options.get("num_groups", 1)
    if groups > 1 or bias is not None:
        values = score if bias is None else score + sanitised(bias)
    if groups > 1:
        members = np.sort(values.reshape(len(values), groups, -1), axis=-1)
        with np.errstate(over="ignore"):
            rank = members[..., -1] + (members[..., -2] if options["group_score"] == "top2_sum" else 0)
        dropped = ranked(rank)[:, options["topk_groups"] :]
        of_expert = np.arange(NUM_EXPERTS) // (NUM_EXPERTS // groups)
        values = np.where((of_expert[None, :, None] == dropped[:, None, :]).any(-1), -np.inf, values)
    return ranked(values)[:, :TOP_K]


# times 8 kinds of rows, 5 selections and 3 dtypes: 10^5 rows, and 10^6
@pytest.mark.parametrize("name", OPTIONS)
@counts(ci=834, full=8_340)
def test_any_logits(backend: str, name: str, count: int) -> None:
    for kind in KINDS:
        for dtype in DTYPES:
            logits, options, wanted = case(kind, name, dtype, count)
            ids, weights, *_ = routing = switchgear.route(logits, TOP_K, **options)
            label = f"{kind}, {dtype}"
            assert equal_bits(routing[:2], wanted[:2]), label
            assert ((ids >= 0) & (ids < NUM_EXPERTS)).all(), label
            assert (ids.sort(-1).values.diff() > 0).all(), label
            assert np.array_equal(ids.numpy(), chosen(logits, options)), label
            assert weights.isfinite().all(), label
            assert (weights >= 0).all(), label
            check_weights(logits, ids, weights, options)


def check_weights(logits: Tensor, ids: Tensor, weights: Tensor, options: dict[str, Any]) -> None:
    """Scores against float64. In float32, z - max has an error of u·|z - max|, which exp turns into a relative error;
    8·u covers exp (1 ulp), the division, normalisation and scale. exp is 0 below the normal range."""
    wide = torch.from_numpy(sanitised(logits)).double()
    sigmoid = options.get("score_function") == "sigmoid"
    score = torch.sigmoid(wide) if sigmoid else torch.softmax(wide, -1)
    exponent = wide if sigmoid else wide - wide.amax(-1, keepdim=True)
    score, exponent = (t.gather(1, ids.long()) for t in (score, exponent))
    error = 2.0**-24 * (8 + exponent.abs().clamp(max=120)) * score + 2.0**-125
    if options.get("normalize"):
        total = score.sum(-1, keepdim=True) + 1e-20
        score, error = score / total, error / total + score / total**2 * error.sum(-1, keepdim=True) * 1.01
    scale = options.get("scale", 1.0)
    defined = error < 0.5 * scale  # if all scores vanish there are no ratios to compare
    difference = (weights.double() - scale * score).abs()
    assert (difference <= scale * error)[defined].all()


def test_nan_never_beats_a_finite_logit(backend: str) -> None:
    logits = torch.randn(200, NUM_EXPERTS)
    logits[torch.rand(logits.shape) < 0.5] = torch.nan
    chosen_logits = logits.gather(1, switchgear.route(logits, 3).topk_ids.long())
    assert chosen_logits.isfinite().all()
    assert switchgear.route(torch.full((4, NUM_EXPERTS), torch.nan), 3).topk_ids.tolist() == [[0, 1, 2]] * 4


def test_a_row_does_not_depend_on_the_others(backend: str) -> None:
    logits, options, _ = case("mixed", "sigmoid in groups, biased", torch.float32, 64)
    whole = switchgear.route(logits, TOP_K, **options)[:2]
    for threads in (2, 5):
        torch.set_num_threads(threads)
        many = switchgear.route(logits.repeat(30, 1), TOP_K, **options)[:2]
        assert all(equal_bits(part, row.repeat(30, 1)) for part, row in zip(many, whole, strict=True))
    for row in range(0, 64, 7):
        alone = switchgear.route(logits[row : row + 1], TOP_K, **options)[:2]
        assert all(equal_bits(part, rows[row : row + 1]) for part, rows in zip(alone, whole, strict=True))


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_gradients_of_any_logits(backend: str, name: str) -> None:
    """Finite, and zero for logits that are not finite: sanitising is constant there."""
    for kind in KINDS:
        for dtype in DTYPES:
            logits, options, wanted = case(kind, name, dtype, 64)
            normalize = kind not in ("huge", "any bits")  # otherwise 0/0 of vanished scores, with a gradient of 1e20
            grad = ops.route_backward(
                torch.ones_like(wanted.topk_weights),
                logits,
                wanted.topk_ids,
                name,
                normalize,
                options.get("scale", 1.0),
            )
            assert grad.isfinite().all(), f"{kind}, {dtype}"
            assert not grad[~logits.isfinite()].any(), f"{kind}, {dtype}"
