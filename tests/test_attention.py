# SPDX-License-Identifier: BSD-3-Clause
"""attend, rms_norm and rotate_heads against float64, and the order of their sums."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from errors import raises
from switchgear import _C
from switchgear.functional import attend, rms_norm, rotate_heads
from switchgear.reference import attention
from switchgear.testing import EVALUATION, U32, Bounded, C, assert_close

pytestmark = pytest.mark.in_turns

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Case(NamedTuple):
    batch: int
    tokens: int
    heads: int
    cache_heads: int
    length: int
    depth: int
    width: int
    window: int | None = None
    starts: tuple[int, ...] | None = None
    has_sinks: bool = False


# Blocks have 128 positions, tiles 6 rows and the vectors of an ISA; a tile of rows has 48.
CASES = (
    Case(1, 1, 1, 1, 1, 1, 1),
    Case(1, 1, 4, 2, 257, 64, 64),
    Case(2, 7, 8, 2, 200, 40, 24, starts=(3, 190), has_sinks=True),
    Case(2, 130, 6, 6, 300, 64, 8, window=50, starts=(-5, 100)),
    Case(1, 60, 3, 1, 60, 20, 36, window=1),
    Case(3, 5, 2, 1, 385, 16, 80, window=130, starts=(0, 385, -130), has_sinks=True),
    Case(1, 2, 14, 2, 129, 128, 128, window=128, has_sinks=True),
)
SPARE = 5  # positions of the cache that are not filled


def draw(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q = randn(case.batch, case.tokens, case.heads, case.depth)
    keys = randn(case.batch, case.cache_heads, case.length + SPARE, case.depth)
    values = randn(case.batch, case.cache_heads, case.length + SPARE, case.width)
    options = {
        "length": case.length,
        "window": case.window,
        "starts": None if case.starts is None else torch.tensor(case.starts, dtype=torch.int32),
        "sinks": randn(case.heads) if case.has_sinks else None,
    }
    return q.to(dtype), keys.to(dtype), values.to(dtype), options


def bound(q: Tensor, keys: Tensor, values: Tensor, options: dict[str, Any], case: Case) -> Bounded:
    """The exact result, and a bound of its error: that of the scores, of the weights, which are relative to the largest
    one, and of the sums over blocks."""
    q, keys, values = (t.double() for t in (q, keys, values))
    scale, length = case.depth**-0.5, case.length
    value = attention.attend(q, keys, values, options["starts"], options["sinks"], length, scale, case.window or 0)
    k = keys[:, :, :length].abs().repeat_interleave(case.heads // case.cache_heads, 1)
    v = values[:, :, :length].abs().repeat_interleave(case.heads // case.cache_heads, 1)
    products = (q.abs().transpose(1, 2) @ k.mT).amax(-1) * scale  # [B,N,T], at least each |score|
    score = C * (case.depth + 2) * U32 * products
    blocks = length // 128 + 2
    relative = torch.expm1(4 * score) + C * (length + EVALUATION * blocks + 2 * EVALUATION) * U32
    error = 2 * relative.transpose(1, 2)[..., None] * v.amax((2, 3), keepdim=True).transpose(1, 2)
    return Bounded(value, error.expand_as(value))


@dtypes
def test_values_against_float64(backend: str, dtype: torch.dtype) -> None:
    for case in CASES:
        q, keys, values, options = draw(case, dtype)
        keys[:, :, case.length :], values[:, :, case.length :] = torch.nan, torch.nan  # never read
        assert_close(
            attend(q, keys, values, **options), bound(q, keys, values, options, case).rounded(dtype), str(case)
        )


@dtypes
def test_strides(backend: str, dtype: torch.dtype) -> None:
    case = CASES[2]
    q, keys, values, options = draw(case, dtype)
    want = attend(q, keys, values, **options)
    spread = [torch.stack((t, t), 3)[..., 0, :] for t in (q, keys, values)]
    assert torch.equal(attend(*spread, **options), want)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, keys, values)]
    assert torch.equal(attend(*turned, **options), want)


@dtypes
@pytest.mark.parametrize("window", [None, 1, 100, 128])
def test_a_row_does_not_depend_on_the_call(isa: str, dtype: torch.dtype, window: int | None) -> None:
    """The bits of a token: alone, in a prompt, in prompts cut anywhere, padded beside another sequence, for any threads
    and any later tokens."""
    tokens, pad = 261, 37
    case = Case(1, tokens, 4, 2, tokens, 24, 40)
    q, keys, values, _ = draw(case, dtype)
    keys, values = keys[:, :, :tokens], values[:, :, :tokens]
    whole = attend(q, keys, values, window=window)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for cut in (1, 127, 200, 260):
                head = attend(q[:, :cut], keys, values, length=cut, window=window)
                assert torch.equal(torch.cat((head, attend(q[:, cut:], keys, values, window=window)), 1), whole)
            alone = [attend(q[:, t : t + 1], keys, values, length=t + 1, window=window) for t in range(0, tokens, 7)]
            assert torch.equal(torch.cat(alone, 1), whole[:, ::7])
            padded = [torch.full((2, *t.shape[1:]), torch.nan, dtype=dtype) for t in (q, keys, values)]
            padded = [
                torch.cat((p[:, :pad] if d == 1 else p[:, :, :pad], p), d)
                for p, d in zip(padded, (1, 2, 2), strict=True)
            ]
            padded[0][0, pad:], padded[1][0, :, pad:], padded[2][0, :, pad:] = q[0], keys[0], values[0]
            starts = torch.tensor([pad, 0])
            assert torch.equal(attend(*padded, window=window, starts=starts)[0, pad:], whole[0])
        dropped = attend(q[:, -1:], keys[:, :, 130:], values[:, :, 130:], window=window, starts=torch.tensor([-130]))
        assert window is None or torch.equal(dropped[:, 0], whole[:, -1])
        keys[:, :, 200:], values[:, :, 200:] = torch.nan, torch.inf
        assert torch.equal(attend(q, keys, values, window=window)[:, :200], whole[:, :200])
    finally:
        torch.set_num_threads(before)


def test_rows_that_see_nothing_are_zero(backend: str) -> None:
    q, keys, values, _ = draw(Case(2, 4, 2, 1, 6, 8, 8), torch.float32)
    keys[0, :, :5], values[0, :, :5] = torch.nan, torch.nan
    for sinks in (None, torch.ones(2)):
        out = attend(q, keys, values, length=6, starts=torch.tensor([5, 6]), sinks=sinks)
        assert not bool(out[0, :3].any() or out[1].any())
        assert bool(out[0, 3].isfinite().all())


def test_gradients(backend: str) -> None:
    for case in (CASES[2], CASES[5], CASES[6]):
        q, keys, values, options = draw(case, torch.float32)
        leaves = [t.requires_grad_() for t in (q, keys, values, options["sinks"])]
        out = attend(*leaves[:3], **options | {"sinks": leaves[3]})
        grad = torch.randn(out.shape)
        got = torch.autograd.grad(out, leaves, grad)
        wide = [t.detach().double().requires_grad_() for t in leaves[:3]]
        sinks = leaves[3].detach().requires_grad_()
        want = attention.attend(*wide, options["starts"], sinks, case.length, case.depth**-0.5, case.window or 0)
        for a, b in zip(got, torch.autograd.grad(want, [*wide, sinks], grad.double()), strict=True):
            torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-4)


@dtypes
@pytest.mark.parametrize("wide_weight", [False, True])
def test_rms_norm(backend: str, dtype: torch.dtype, wide_weight: bool) -> None:
    for rows, width in ((1, 1), (5, 33), (70, 2050)):
        x, residual, weight = torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
        x, residual, weight = x.to(dtype), residual.to(dtype), weight.to(torch.float32 if wide_weight else dtype)
        y, total = rms_norm(x, weight, 1e-5, residual)
        for given, got in ((x, rms_norm(x, weight, 1e-5)), (total, y)):
            exact = attention.rms_norm(given.double(), None, weight.double(), 1e-5)[0]
            assert_close(got, Bounded(exact, C * (width + EVALUATION) * U32 * exact.abs()).rounded(dtype))
        assert torch.equal(total, (x.float() + residual.float()).to(dtype))


@dtypes
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_rotate_heads(backend: str, dtype: torch.dtype, interleaved: bool) -> None:
    for batch, tokens, heads, cache_heads, depth, angles in (
        (1, 1, 1, 1, 2, 1),
        (2, 5, 6, 2, 20, 10),
        (1, 70, 4, 4, 33, 7),
    ):
        q, k, v = (
            torch.randn(batch, tokens, n, d).to(dtype)
            for n, d in ((heads, depth), (cache_heads, depth), (cache_heads, 7))
        )
        theta = torch.randn(batch if depth == 20 else 1, tokens, angles)
        cos, sin = theta.cos().to(dtype), theta.sin()
        if depth != 20:
            sin = sin.to(dtype)
        for sizes in (None, (depth, depth), (heads * depth, cache_heads * depth)):
            weights = (None, None) if sizes is None else tuple(torch.randn(n).to(dtype) for n in sizes)
            options = {"q_weight": weights[0], "k_weight": weights[1], "interleaved": interleaved}
            got = rotate_heads(q, k, v, cos, sin, **options, eps=1e-5)
            wide = [None if t is None else t.double() for t in (q, k, v, cos, sin, *weights)]
            want = attention.rotate_heads(*wide, 1e-5, interleaved)
            size = [t.square().sum(-1, keepdim=True).sqrt() for t in want]  # of both elements that turn
            for a, b, s in zip(got[:2], want, size, strict=False):
                assert_close(a, Bounded(b, C * (heads * depth + EVALUATION) * U32 * s.expand_as(b)).rounded(dtype))
            assert torch.equal(got[2], v.transpose(1, 2))
        rotated, keys, values = rotate_heads(q, k, v)
        assert torch.equal(rotated, q)
        assert torch.equal(keys, k.transpose(1, 2))
        assert torch.equal(values, v.transpose(1, 2))


def test_heads_go_into_a_cache(backend: str) -> None:
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 2, 8), torch.randn(2, 3, 2, 6)
    angles = torch.randn(1, 3, 4)
    memory = torch.zeros(2, 2, 10, 8), torch.zeros(2, 2, 10, 6)
    into = memory[0][:, :, 4:7], memory[1][:, :, 4:7]
    got = rotate_heads(q, k, v, angles.cos(), angles.sin(), into=into)
    for a, b in zip(got, rotate_heads(q, k, v, angles.cos(), angles.sin()), strict=True):
        assert torch.equal(a, b)
    assert all(not bool(m[:, :, :4].any() or m[:, :, 7:].any()) for m in memory)
    assert got[1].data_ptr() == into[0].data_ptr()


def test_gradients_of_norms_and_heads(backend: str) -> None:
    x, residual, weight = (torch.randn(*s, requires_grad=True) for s in ((3, 8), (3, 8), (8,)))
    y, total = rms_norm(x, weight, 1e-6, residual)
    wide = [t.detach().double().requires_grad_() for t in (x, residual, weight)]
    want = attention.rms_norm(*wide, 1e-6)
    grads = torch.randn(3, 8), torch.randn(3, 8)
    expected = torch.autograd.grad(want, wide, [g.double() for g in grads])
    for a, b in zip(torch.autograd.grad((y, total), (x, residual, weight), grads), expected, strict=True):
        torch.testing.assert_close(a, b.float())
    q, k, v, w = (torch.randn(*s, requires_grad=True) for s in ((1, 3, 4, 8), (1, 3, 2, 8), (1, 3, 2, 6), (8,)))
    angles = torch.randn(1, 3, 4)
    for interleaved in (False, True):
        out = rotate_heads(q, k, v, angles.cos(), angles.sin(), q_weight=w, k_weight=w, interleaved=interleaved)
        wide = [t.detach().double().requires_grad_() for t in (q, k, v, w)]
        cos, sin = angles.cos().double(), angles.sin().double()
        want = attention.rotate_heads(*wide[:3], cos, sin, wide[3], wide[3], 1e-6, interleaved)
        grads = [torch.randn(t.shape) for t in out]
        expected = torch.autograd.grad(want, wide, [g.double() for g in grads])
        for a, b in zip(torch.autograd.grad(out, (q, k, v, w), grads), expected, strict=True):
            torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("keys", {"keys": torch.ones(1, 3, 6, 8), "values": torch.ones(1, 3, 6, 8)}),
        ("values", {"values": torch.ones(1, 2, 5, 8)}),
        ("starts", {"starts": torch.ones(2, dtype=torch.int32)}),
        ("starts", {"starts": torch.tensor([8])}),
        ("sinks", {"sinks": torch.ones(3)}),
        ("length", {"length": 1}),
        ("length", {"length": 7}),
        ("scale", {"scale": 0.0}),
        ("window", {"window": -1}),
    ],
)
def test_errors(backend: str, argument: str, change: dict[str, Any]) -> None:
    arguments = {"q": torch.ones(1, 2, 4, 8), "keys": torch.ones(1, 2, 6, 8), "values": torch.ones(1, 2, 6, 8)}
    with raises(ValueError, argument):
        attend(**arguments | change)


def test_errors_of_norms_and_heads(backend: str) -> None:
    with raises(ValueError, "weight"):
        rms_norm(torch.ones(2, 4), torch.ones(3))
    with raises(ValueError, "eps"):
        rms_norm(torch.ones(2, 4), torch.ones(4), 0.0)
    heads = torch.ones(1, 2, 4, 8), torch.ones(1, 2, 2, 8), torch.ones(1, 2, 2, 8)
    with raises(ValueError, "sin"):
        rotate_heads(*heads, torch.ones(1, 2, 4))
    with raises(ValueError, "cos"):
        rotate_heads(*heads, torch.ones(1, 2, 5), torch.ones(1, 2, 5))
    with raises(ValueError, "k_weight"):
        rotate_heads(*heads, k_weight=torch.ones(9))
    with raises(ValueError, "into"):
        rotate_heads(heads[0].requires_grad_(), *heads[1:], into=(torch.ones(1, 2, 2, 8), torch.ones(1, 2, 2, 8)))


@pytest.mark.parametrize("case", ["q_proj", "k_proj", "o_proj", "length", "angles", "cos", "y"])
def test_attention_block_checks_what_its_ops_get(case: str) -> None:
    batch, count, hidden, heads, depth = 2, 3, 16, 2, 8
    norm, square = torch.ones(hidden), torch.randn(hidden, hidden)
    given: dict[str, Any] = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), square)
    given |= {"cos": torch.ones(1, count, depth // 2), "length": count, "angles": depth // 2}
    given["y"] = torch.empty(batch * count, hidden)
    small = {"q_proj": torch.randn(depth - 1, hidden), "cos": torch.ones(count), "y": torch.empty(1, hidden)}
    wrong = {"k_proj": square[:-1], "o_proj": square[:, :-1], "length": count + 99, "angles": -1, **small}

    def run(given: dict[str, Any]) -> None:
        projections = [item for name in ("q_proj", "k_proj", "v_proj", "o_proj") for item in (given[name], (), None)]
        inputs = torch.randn(batch, count, hidden), norm, norm, *projections, None, None, given["cos"], given["cos"]
        options = given["angles"], given["length"], 1.0, 0, 1e-6, 1e-6, 1e-6
        cache = torch.zeros(batch, heads, 8, depth), torch.zeros(batch, heads, 8, depth)
        outputs = *cache, given["y"], torch.empty(batch * count, hidden)
        _C.attention_block((*inputs, None, None), options, outputs, 0)

    run(given)
    with pytest.raises((ValueError, TypeError)):
        run(given | {case: wrong[case]})
