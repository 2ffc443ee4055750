# SPDX-License-Identifier: BSD-3-Clause
"""AdaptedWeight: a projection with an adapter, W + scale_e · B_e[:, :r_e] · A_e[:r_e], against loops in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import switchgear
from errors import raises
from switchgear import ops, reference
from switchgear.ops import GluOptions
from switchgear.testing import Case, Layer, make_layer
from switchgear.weights import AdaptedWeight, Form, Fp8, Groups, Mxfp4, Nf4, Weight, encode

pytestmark = pytest.mark.in_turns

DEFAULT = GluOptions()
OPTIONS = (
    DEFAULT,
    GluOptions("gelu", gated=False),
    GluOptions("swiglu_oai", interleaved=True, alpha=1.5, limit=2.0),
)
CASES = (
    Case("small", 9, 2, 5, 20, 12),
    Case("wider_than_panels", 40, 3, 4, 136, 72, "holes"),
    Case("few", 300, 2, 4, 40, 24, "few"),
    Case("one_token", 1, 2, 8, 64, 32),
    Case("one_expert", 7, 1, 1, 32, 24),
    Case("no_tokens", 0, 2, 8, 64, 32),
    Case("all_sizes_one", 1, 1, 1, 1, 1),
)
SMALL = CASES[0]
MANY = Case("many", 520, 2, 4, 272, 264)  # terms of all columns exceed 1 MB, so tiles multiply their own


class Adapted(NamedTuple):
    """A layer and the adapters of both projections."""

    layer: Layer
    adapters: tuple[AdaptedWeight, AdaptedWeight]

    def leaves(self) -> list[Tensor]:
        """x, topk_weights, the biases, and a and b of both adapters."""
        layer, (first, second) = self
        tensors = (
            layer.x,
            layer.topk_weights,
            layer.gate_up_bias,
            layer.down_bias,
            first.a,
            first.b,
            second.a,
            second.b,
        )
        return [tensor for tensor in tensors if tensor is not None]


NAMES = ("x", "topk_weights", "gate_up_bias", "down_bias", "A_gu", "B_gu", "A_d", "B_d")


def make(
    case: Case, dtype: torch.dtype, rank: int, *, ragged: bool = False, dropout: float = 0.0, gated: bool = True
) -> Adapted:
    layer = make_layer(case, dtype, gated=gated, bias=True)

    def adapted(weight: Tensor) -> AdaptedWeight:
        experts, rows, columns = weight.shape
        a = (torch.randn(experts, rank, columns, dtype=torch.float64) / math.sqrt(columns)).to(dtype)
        b = (torch.randn(experts, rows, rank, dtype=torch.float64) / math.sqrt(rank)).to(dtype)
        scale: float | Tensor = 0.75
        ranks = None
        if ragged:
            scale, ranks = torch.randn(experts), torch.arange(experts).int().remainder(rank + 1).flip(0)
        return AdaptedWeight(weight, a, b, scale, ranks, dropout)

    return Adapted(layer, (adapted(layer.gate_up_proj), adapted(layer.down_proj)))


def call(adapted: Adapted, options: GluOptions = DEFAULT) -> Tensor:
    layer = adapted.layer
    keywords: dict[str, Any] = options.keywords()
    return switchgear.moe(
        layer.x, *adapted.adapters, layer.topk_ids, layer.topk_weights, gate_up_bias=layer.gate_up_bias,
        down_bias=layer.down_bias, **keywords,
    )  # fmt: skip


def doubled(adapted: Adapted) -> Adapted:
    """The same numbers in float64, as leaves."""

    def double(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.detach().double().requires_grad_()

    layer = Layer(*(t if t is not None and not t.is_floating_point() else double(t) for t in adapted.layer))
    adapters = tuple(
        weight._replace(weight=proj, a=double(weight.a), b=double(weight.b))
        for weight, proj in zip(adapted.adapters, (layer.gate_up_proj, layer.down_proj), strict=True)
    )
    return Adapted(layer, (adapters[0], adapters[1]))


def loop(adapted: Adapted, options: GluOptions, seed: Tensor | None = None) -> Tensor:
    """y by a loop over tokens and choices, for autograd in float64."""
    layer, both = adapted
    slots = reference.plan(layer.topk_ids, layer.gate_up_proj.shape[0])[2]

    def times(row: Tensor, expert: int, projection: int, slot: int) -> Tensor:
        weight = both[projection]
        rank = weight.a.shape[1] if weight.ranks is None else int(weight.ranks[expert])
        scale = float(weight.scale[expert]) if isinstance(weight.scale, Tensor) else weight.scale
        masked = row
        if weight.dropout:
            assert seed is not None
            kept = reference.keeps(seed, projection, slots.numel(), len(row), weight.dropout)[slot]
            masked, scale = row * kept, scale / (1 - weight.dropout)
        low = weight.a[expert, :rank] @ masked
        assert isinstance(weight.weight, Tensor)
        return weight.weight[expert] @ row + scale * (weight.b[expert, :, :rank] @ low)

    rows = []
    for t, ids in enumerate(layer.topk_ids.tolist()):
        total = torch.zeros(layer.x.shape[1], dtype=torch.float64)
        for k, expert in enumerate(ids):
            if expert < 0:
                continue
            slot = int(slots[t, k])
            h = times(layer.x[t], expert, 0, slot)
            if layer.gate_up_bias is not None:
                h = h + layer.gate_up_bias[expert]
            y = times(switchgear.glu(h[None], **options.keywords())[0], expert, 1, slot)
            if layer.down_bias is not None:
                y = y + layer.down_bias[expert]
            total = total + layer.topk_weights[t, k] * y
        rows.append(total)
    if not rows:
        return torch.stack([leaf.sum() for leaf in adapted.leaves()]).sum() * torch.zeros(0, layer.x.shape[1])
    return torch.stack(rows)


def distance(got: Tensor, wanted: Tensor) -> float:
    """The largest difference in units of the largest number."""
    if not got.numel():
        return 0.0
    got, wanted = got.detach(), wanted.detach()
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-6))


# Sums of up to 200 numbers of about equal size, each rounded a few times on the way.
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}


def check(adapted: Adapted, options: GluOptions = DEFAULT, *, fixed_seed: Tensor | None = None) -> None:
    exact = doubled(adapted)
    wanted = loop(exact, options, fixed_seed)
    grad_y = torch.randn(wanted.shape, dtype=torch.float64)
    leaves = adapted.leaves()
    for leaf in leaves:
        leaf.requires_grad_()
    y = call(adapted, options)
    bound = BOUNDS[y.dtype]
    assert y.dtype is adapted.layer.x.dtype
    assert distance(y, wanted) < bound
    with torch.no_grad():
        if fixed_seed is None:
            assert torch.equal(call(adapted, options), y)
    grads = torch.autograd.grad(y, leaves, grad_y.to(y.dtype))
    wanted_grads = torch.autograd.grad(wanted, exact.leaves(), grad_y.to(y.dtype).double())
    for name, got, want in zip(NAMES, grads, wanted_grads, strict=True):
        assert got.shape == want.shape
        assert got.isfinite().all(), name
        assert distance(got, want) < bound, name
    for leaf in leaves:
        leaf.requires_grad_(False)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(backend: str, case: Case, dtype: torch.dtype) -> None:
    check(make(case, dtype, 3))


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 16, 32, 33, 65])
def test_ranks(backend: str, rank: int) -> None:
    check(make(SMALL, torch.float32, rank))
    check(make(SMALL, torch.bfloat16, rank, ragged=True))


def test_many_rows(isa: str) -> None:
    check(make(MANY, torch.bfloat16, 17, ragged=True))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.activation)
def test_options(backend: str, options: GluOptions) -> None:
    check(make(SMALL, torch.float32, 4, gated=options.gated), options)


def test_float64() -> None:
    """Also with a scale of 3/5, which float32 rounds."""
    check(make(SMALL, torch.float64, 5, ragged=True))
    layer, (first, second) = make(CASES[4], torch.float64, 2)
    check(Adapted(layer, (first._replace(scale=0.6), second._replace(scale=0.6))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", [None, Nf4()], ids=str)
def test_float32_adapters_of_activations_of_16_bits(backend: str, form: Form | None, dtype: torch.dtype) -> None:
    adapted = make(SMALL, dtype, 3)
    if form is not None:
        adapted = beside(adapted, form)
    first, second = (weight._replace(a=weight.a.float(), b=weight.b.float()) for weight in adapted.adapters)
    check(Adapted(adapted.layer, (first, second)))
    plan = switchgear.plan(adapted.layer.topk_ids, 5)
    got, wanted = (
        switchgear.grouped_gemm(adapted.layer.x[plan.token_indices.long()], weight, plan.expert_offsets)
        for weight in (first, adapted.adapters[0])
    )
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("case", CASES[:5], ids=str)
@pytest.mark.some(16)
def test_beside_weights_of_mixed_bits(backend: str, case: Case, symmetric: bool, dtype: torch.dtype) -> None:
    """Decoded in float64, the weights are exact: 11 bits times 5. So the bounds are those of plain weights."""
    plain = make(case, dtype, 3, ragged=True)
    bits = [1 + expert % 4 for expert in range(len(plain.layer.gate_up_proj))]
    check(beside(plain, Groups(bits, 32, symmetric)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [Fp8(block="row"), Mxfp4(), Nf4()], ids=str)
def test_beside_minifloats(backend: str, form: Form, dtype: torch.dtype) -> None:
    """nf4 is that of QLoRA. Values and scales have fewer than 64 bits together, or are rounded to float32 once."""
    check(beside(make(SMALL, dtype, 4), form))


def beside(plain: Adapted, form: Form) -> Adapted:
    """The same adapters on stored weights, and a layer of their values."""
    layer, adapters = plain
    stored = [encode(weight, form, parts=parts) for weight, parts in ((layer.gate_up_proj, 2), (layer.down_proj, 1))]
    decoded = [decode(weight) for weight in stored]
    pair = [adapter._replace(weight=weight) for adapter, weight in zip(adapters, stored, strict=True)]
    return Adapted(layer._replace(gate_up_proj=decoded[0], down_proj=decoded[1]), (pair[0], pair[1]))


def decode(weight: Tensor | Weight) -> Tensor:
    """In float64."""
    assert isinstance(weight, Weight)
    return dataclasses.replace(weight, dtype=torch.float32).plain().double()


def test_elements_past_a_rank_are_not_read(backend: str) -> None:
    adapted = make(SMALL, torch.float32, 6, ragged=True)
    for weight in adapted.adapters:
        assert weight.ranks is not None
        unused = torch.arange(6) >= weight.ranks[:, None]
        weight.a.masked_fill_(unused[:, :, None], math.nan)
        weight.b.masked_fill_(unused[:, None, :], math.nan)
    leaves = [tensor.requires_grad_() for tensor in adapted.leaves()]
    y = call(adapted)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert y.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    ranks = adapted.adapters[0].ranks
    assert ranks is not None
    unused = torch.arange(6) >= ranks[:, None]
    assert not grads[4][unused].any()
    assert not grads[5].mT[unused].any()


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dropout(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward drop the elements that the specification's mask does; each call draws a seed."""
    seed = torch.tensor([0x0123456789ABCDEF])
    adapted = make(SMALL, dtype, 4, dropout=0.3)
    first, second = call(adapted), call(adapted)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    first = call(adapted)
    torch.manual_seed(1)
    assert torch.equal(first, call(adapted))
    monkeypatch.setattr(switchgear.functional.layer, "dropout_seed", lambda device: seed)
    check(adapted, fixed_seed=seed)
    check(make(SMALL, dtype, 4, dropout=0.9, ragged=True), fixed_seed=seed)


def test_masks() -> None:
    """Half of the bits of many masks, and no two rows, projections or seeds alike."""
    p, shape = 0.25, (400, 300)
    one, other = (reference.keeps(torch.tensor([seed]), 0, *shape, p) for seed in (7, 7 + 2**32))
    masks = [one, other, reference.keeps(torch.tensor([7]), 1, *shape, p), one[:, 1:], one[1:]]
    sigma = math.sqrt(p * (1 - p) / one.numel())
    for mask in masks:
        assert abs(float(mask.double().mean()) - (1 - p)) < 5 * sigma
    agreement = 1 - 2 * p * (1 - p)
    sigma = math.sqrt(agreement * (1 - agreement) / one.numel())
    for left, right in ((one, other), (one, masks[2]), (one[:, :-1], one[:, 1:]), (one[:-1], one[1:])):
        assert abs(float((left == right).double().mean()) - agreement) < 5 * sigma
    assert bool(reference.keeps(torch.tensor([7]), 0, *shape, 1e-12).all())


# ---- contracts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [CASES[1], MANY], ids=str)
def test_a_token_does_not_depend_on_others(isa: str, case: Case, dtype: torch.dtype) -> None:
    adapted = make(case, dtype, 9, ragged=True)
    whole = call(adapted)
    for rows in (slice(0, 1), slice(3, 11), slice(39, 40)):
        names = ("x", "topk_ids", "topk_weights")
        layer = adapted.layer._replace(**{name: getattr(adapted.layer, name)[rows] for name in names})
        assert torch.equal(call(adapted._replace(layer=layer)), whole[rows])


def gradients(adapted: Adapted) -> list[Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in adapted.leaves()]
    x, weights, gate_up_bias, down_bias, *rest = leaves
    layer = adapted.layer._replace(x=x, topk_weights=weights, gate_up_bias=gate_up_bias, down_bias=down_bias)
    pairs = zip(adapted.adapters, rest[::2], rest[1::2], strict=True)
    first, second = (weight._replace(a=a, b=b) for weight, a, b in pairs)
    torch.manual_seed(3)
    y = call(Adapted(layer, (first, second)))
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def test_any_number_of_threads(isa: str) -> None:
    adapted = make(CASES[1], torch.bfloat16, 9, ragged=True, dropout=0.2)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(gradients(adapted))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(other, results[0], strict=True))


def test_strides(backend: str) -> None:
    """Transposed adapters and weights, rows apart: the same bits as contiguous ones."""
    adapted = make(SMALL, torch.float32, 5)
    wanted = gradients(adapted)

    def moved(tensor: Tensor) -> Tensor:
        return tensor.mT.contiguous().mT

    def spread(tensor: Tensor) -> Tensor:
        return tensor.repeat(1, 1, 2)[..., : tensor.shape[-1]]

    for change in (moved, spread):
        first, second = (weight._replace(a=change(weight.a), b=change(weight.b)) for weight in adapted.adapters)
        for got, want in zip(gradients(adapted._replace(adapters=(first, second))), wanted, strict=True):
            assert distance(got, want) < 1e-5


def test_one_projection_alone(backend: str) -> None:
    adapted = make(SMALL, torch.float32, 3)
    layer, (first, second) = adapted
    for weights in ((first, layer.down_proj), (layer.gate_up_proj, second)):
        whole = [
            weight.weight + 0.75 * weight.b @ weight.a if isinstance(weight, AdaptedWeight) else weight
            for weight in weights
        ]
        biases = {"gate_up_bias": layer.gate_up_bias, "down_bias": layer.down_bias}
        got, wanted = (
            switchgear.moe(layer.x, *projections, layer.topk_ids, layer.topk_weights, **biases)
            for projections in (weights, whole)
        )
        assert distance(got, wanted) < 1e-5


def test_trained_weights_with_adapters(backend: str) -> None:
    """The weights' own gradients are those of a layer without adapters that has the same h and grad_h: B is zero."""
    layer, adapters = make(SMALL, torch.float32, 3)
    proj = [layer.gate_up_proj.requires_grad_(), layer.down_proj.requires_grad_()]
    adapted = [
        weight._replace(weight=own, b=torch.zeros_like(weight.b)) for weight, own in zip(adapters, proj, strict=True)
    ]
    call_of = (layer.topk_ids, layer.topk_weights)
    got = torch.autograd.grad(switchgear.moe(layer.x, *adapted, *call_of).square().sum(), proj)
    wanted = torch.autograd.grad(switchgear.moe(layer.x, *proj, *call_of).square().sum(), proj)
    assert all(distance(*pair) < 1e-5 for pair in zip(got, wanted, strict=True))


def test_grouped_gemm(backend: str) -> None:
    layer, (first, _) = make(SMALL, torch.float32, 4, ragged=True)
    plan = switchgear.plan(layer.topk_ids, 5)
    assert first.ranks is not None
    used = torch.arange(4) < first.ranks[:, None]
    assert isinstance(first.scale, Tensor)
    low_rank = first.scale[:, None, None] * (first.b * used[:, None]) @ first.a
    whole = layer.gate_up_proj + low_rank
    rest = {"bias": layer.gate_up_bias, "token_indices": plan.token_indices}
    got, wanted = (switchgear.grouped_gemm(layer.x, w, plan.expert_offsets, **rest) for w in (first, whole))
    used_slots = int(plan.expert_offsets[-1])
    assert distance(got[:used_slots], wanted[:used_slots]) < 1e-5


def test_opcheck() -> None:
    layer, adapters = make(SMALL, torch.float32, 4, ragged=True)
    seed = torch.tensor([3])
    lists = [weight.adapter() for weight in adapters]
    for drops in ((None, ()), (seed, (0.5, 0.0))):
        args = (*layer.arguments(), *DEFAULT, True, *lists, *drops)
        torch.library.opcheck(torch.ops.switchgear.moe_forward.default, args)
        h = ops.moe_forward(*args)[1]
        for needs in ([True] * 10, [False] * 7 + [True, False, True], [True] * 6):
            back = (layer.x, layer.x, h, *layer.arguments()[1:], *DEFAULT, needs, *lists, *drops)
            torch.library.opcheck(torch.ops.switchgear.moe_backward.default, back)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.checks_values
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"a": torch.zeros(5, 3, 19)}, ValueError, "gate_up_adapter_a"),
        ({"a": torch.zeros(4, 3, 20)}, ValueError, "gate_up_adapter_a"),
        ({"a": torch.zeros(5, 0, 20), "b": torch.zeros(5, 24, 0)}, ValueError, "gate_up_adapter_a"),
        ({"a": torch.zeros(5, 3, 20).half()}, TypeError, "gate_up_adapter_a"),
        ({"b": torch.zeros(5, 24, 4)}, ValueError, "gate_up_adapter_b"),
        ({"b": torch.zeros(5, 23, 3)}, ValueError, "gate_up_adapter_b"),
        ({"scale": torch.zeros(4)}, ValueError, "gate_up_adapter_scales"),
        ({"scale": torch.zeros(5).double()}, TypeError, "gate_up_adapter_scales"),
        ({"scale": torch.tensor([1, 1, math.nan, 1, 1])}, ValueError, "gate_up_adapter_scales"),
        ({"scale": math.inf}, ValueError, "gate_up_adapter_scales"),
        ({"ranks": torch.tensor([0, 1, 2, 3, 4]).int()}, ValueError, "gate_up_adapter_ranks"),
        ({"ranks": torch.tensor([0, 1, 2, 3, -1]).int()}, ValueError, "gate_up_adapter_ranks"),
        ({"ranks": torch.tensor([0, 1, 2, 3])}, TypeError, "gate_up_adapter_ranks"),
        ({"ranks": torch.tensor([0, 1, 2, 3]).int()}, ValueError, "gate_up_adapter_ranks"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"dropout": -0.1}, ValueError, "dropout"),
        ({"dropout": math.nan}, ValueError, "dropout"),
    ],
)  # fmt: skip
def test_bad_input(backend: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    layer, (first, second) = make(SMALL, torch.float32, 3)
    first = first._replace(**changes)
    with raises(error, message):
        call(Adapted(layer, (first, second)))
    with raises(error, message):
        call(Adapted(layer, (first._replace(b=first.b.requires_grad_()), second)))


def test_a_seed_is_needed(backend: str) -> None:
    layer, adapters = make(SMALL, torch.float32, 3)
    lists = [weight.adapter() for weight in adapters]
    args = (*layer.arguments(), *DEFAULT, True, *lists)
    for seed, error, message in (
        (None, ValueError, "dropout_seed"),
        (torch.zeros(1), TypeError, "dropout_seed"),
        (torch.zeros(2, dtype=torch.int64), ValueError, "dropout_seed"),
    ):
        with raises(error, message):
            ops.moe_forward(*args, seed, (0.5, 0.0))
    with raises(ValueError, "dropout"):
        ops.moe_forward(*args, torch.zeros(1, dtype=torch.int64), (0.5,))
    with raises(ValueError, "gate_up_adapter"):
        ops.moe_forward(*layer.arguments(), *DEFAULT, True, lists[0][:2], None)
