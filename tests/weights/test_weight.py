# SPDX-License-Identifier: BSD-3-Clause
"""Weight: what passes to the ops, experts in other slots, weights without a kernel, and devices without one."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from form_cases import FORM_CASES, FormCase, distance, forms, in_records
from torch import Tensor

import switchgear
from errors import raises
from switchgear import ops, reference
from switchgear.reference import formats
from switchgear.weights import AdaptedWeight, Form, Fp8, Int4, Int8, Mxfp4, Weight, encode
from switchgear.weights.gguf import GgufForm

E = 5


def layer_of(case: FormCase, dtype: torch.dtype = torch.float32) -> tuple[Weight, Weight, tuple[Tensor, ...]]:
    hidden, inner = case.hidden_size, case.intermediate_size
    first = encode((torch.randn(E, 2 * inner, hidden) / 8).to(dtype), case.form, parts=2)
    second = encode((torch.randn(E, hidden, inner) / 8).to(dtype), case.form)
    return first, second, case.inputs(11, dtype)


@forms
def test_what_crosses(case: FormCase) -> None:
    weight, _, _ = layer_of(case)
    names = formats.fields_of(weight.form)
    assert weight.form[:5] == (
        formats.FORMATS.index(case.form.name), 2 * case.intermediate_size, case.hidden_size, weight.parts,
        weight.group_size,
    )  # fmt: skip
    assert weight.form[6] == (weight.elements.itemsize if weight.elements else 0)
    assert [getattr(weight, name) for name in names] == list(weight.tensors)
    assert weight.shape == (E, 2 * case.intermediate_size, case.hidden_size)
    assert weight.nbytes == sum(tensor.nbytes for tensor in weight.tensors)
    assert torch.equal(weight.plain(), formats.decode(weight.tensors, weight.form, weight.dtype))
    assert weight.is_exact == case.is_exact
    assert copy.deepcopy(weight).form == weight.form
    with pytest.raises(dataclasses.FrozenInstanceError):
        weight.rows = 3  # type: ignore[misc]


def test_names() -> None:
    data = torch.zeros(2, 3, 4)
    with raises(ValueError, "format"):
        Weight("packed", data, 3, 4, torch.float32)
    with raises(ValueError, "tensors"):
        Weight("plain", data, 3, 4, torch.float32).with_tensors({"order": data})
    assert Weight("plain", data, 3, 4, torch.float32).form == ()


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1], "order"),
        (torch.tensor([True, False, True, True, False]), "order"),
        (torch.tensor([0.0, 1.0]), "order"),
        (torch.tensor([0, 2**32 + 3]), "order"),
        (torch.tensor([0, -1]), "order"),
        (torch.tensor([[0, 1]]), "order"),
    ],
)
def test_what_is_no_order(order: Any, message: str) -> None:
    weight = encode(torch.randn(E, 32, 32), "int8")
    for each in (weight, weight.permuted(torch.arange(E))):
        with raises((TypeError, ValueError), message):
            each.permuted(order)


def skip_forms_of_the_cpu(backend: str, case: FormCase) -> None:
    if backend.startswith(("simt", "cuda")) and case.is_exact:  # slots of plain weights too
        pytest.skip(f"{case} is for the CPU")


PLAIN = FormCase(switchgear.weights.Plain(), (torch.float32,), 0)


@pytest.mark.parametrize("case", [*FORM_CASES, PLAIN], ids=str)
@pytest.mark.parametrize("ids", [[3, 1, 1, 4, 0, 2, 3], [2]], ids=str)
@pytest.mark.some(12)
def test_experts_in_other_places(backend: str, case: FormCase, ids: list[int]) -> None:
    """slots: any order, experts repeated or omitted; nothing is copied."""
    skip_forms_of_the_cpu(backend, case)
    first, second, (x, _, _) = layer_of(case)
    order = torch.tensor(ids)
    slotted = first.permuted(order), second.permuted(order)
    assert slotted[0].data is first.data
    assert slotted[0].shape == (len(ids), *first.shape[1:])
    assert torch.equal(slotted[0].plain(), first.plain()[order])
    topk_ids = torch.randint(-1, len(ids), (11, 2), dtype=torch.int32)
    stored_ids = torch.where(topk_ids < 0, -1, order[topk_ids.clamp(min=0).long()]).int()
    weights = torch.rand(11, 2)
    with torch.no_grad():
        got, wanted = (
            switchgear.moe(x, *pair, ids, weights) for pair, ids in ((slotted, topk_ids), ((first, second), stored_ids))
        )
    # A token's experts are added in ascending order, which renumbering changes.
    assert distance(got, wanted) < 1e-6
    again = slotted[0].permuted(torch.tensor([0, 0]))
    assert again.slots is not None
    assert again.slots.tolist() == [ids[0], ids[0]]
    assert again.with_slots(None).form == first.form

    leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
    grads = [
        torch.autograd.grad(switchgear.moe(leaf, *pair, ids, weights).square().sum(), leaf)[0]
        for leaf, pair, ids in zip(leaves, (slotted, (first, second)), (topk_ids, stored_ids), strict=True)
    ]
    assert distance(*grads) < 1e-5


@pytest.mark.parametrize("case", [*FORM_CASES, PLAIN], ids=str)
def test_experts_in_records(backend: str, case: FormCase) -> None:
    """All tensors of an expert in one record of an arena: the bits of contiguous experts, wherever a weight is read."""
    skip_forms_of_the_cpu(backend, case)
    first, second, (x, topk_ids, weights) = layer_of(case)
    slots = [4, 0, 6, 1, 3]
    apart = in_records(first, slots), in_records(second, slots)
    assert not apart[0].data.is_contiguous()
    assert torch.equal(apart[0].plain(), first.plain())
    if case.form.name != "groups":  # its data counts records in another unit
        in_order = apart[0].with_slots(None)
        assert torch.equal(in_order.plain()[slots], first.plain())

    def results(one: Weight, other: Weight) -> list[Tensor]:
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = switchgear.moe(leaves[0], one, other, topk_ids, leaves[1])
        offsets = switchgear.plan(topk_ids, E).expert_offsets
        rows = x.repeat_interleave(2, 0)
        return [y, *torch.autograd.grad(y.square().sum(), leaves), switchgear.grouped_gemm(rows, one, offsets)]

    for got, wanted in zip(results(*apart), results(first, second), strict=True):
        assert torch.equal(got, wanted)


@forms
def test_strides_that_kernels_do_not_follow(backend: str, case: FormCase) -> None:
    skip_forms_of_the_cpu(backend, case)
    first, second, (x, topk_ids, weights) = layer_of(case)
    apart = in_records(first, list(range(E)))
    for name in ("data", "scales", "row_scales", "zeros"):
        tensor = getattr(apart, name)
        if tensor is None or first.format in formats.GGUF:  # whose experts have any strides
            continue
        stride = tensor.stride(0) - 1
        bad = tensor.as_strided(tensor.shape, (stride, *tensor.stride()[1:]))
        argument = "gate_up_proj" if name == "data" else f"gate_up_proj_{name}"
        with raises(ValueError, argument):
            switchgear.moe(x, apart.with_tensors({name: bad}), second, topk_ids, weights)


@pytest.mark.checks_values
@pytest.mark.parametrize("slots", [[0, 5], [-1, 0]], ids=str)
def test_slots_out_of_range(backend: str, slots: list[int]) -> None:
    first, second, (x, _, weights) = layer_of(FORM_CASES[2])
    places = torch.tensor(slots, dtype=torch.int32)
    with raises(ValueError, "gate_up_proj_slots"):
        switchgear.moe(
            x, first.with_slots(places), second.with_slots(places), torch.zeros(11, 2, dtype=torch.int32), weights
        )


@forms
def test_ops_agree_with_the_reference(isa: str, case: FormCase) -> None:
    """h and y, in each format; the bounds of integers are in test_integers.py."""
    for dtype in case.dtypes:
        first, second, (x, topk_ids, weights) = layer_of(case, dtype)
        biases = torch.randn(E, first.rows).to(dtype), torch.randn(E, second.rows).to(dtype)
        options = "silu", True, False, 1.702, 0.0
        weights_in = first.tensors, first.form, second.tensors, second.form
        layer = reference.Layer(*weights_in, *biases, topk_ids, weights, *options)
        bound = 4e-2 if isinstance(case.form, (Int4, Int8, GgufForm)) else {torch.float32: 1e-5}.get(dtype, 2e-2)
        pairs = zip(ops.layer_forward(x, layer, True), reference.moe_forward(x, layer, True), strict=True)
        for got, wanted in pairs:
            assert distance(got, wanted) < bound
        if case.form.name not in ("panels", "compact"):
            offsets, indices, _ = ops.plan(topk_ids, E)
            grad = torch.randn(len(indices), first.rows).to(dtype)
            call = grad, first.tensors, first.form, None, offsets, None, True, False
            assert distance(ops.grouped_gemm(*call), reference.grouped_gemm(*call)) < bound


@pytest.mark.parametrize("form", [Int8(), Int4(group_size=16, symmetric=False), Fp8(), Mxfp4()], ids=str)
def test_parts_that_fill_no_block(isa: str, form: Form) -> None:
    """A part of 31 rows ends within a block of 16, and within a panel of columns."""
    for part_rows in (8, 17, 31, 33, 70):
        weight = encode(torch.randn(E, 2 * part_rows, 40) / 8, form, parts=2)
        offsets, tokens, _ = ops.plan(torch.randint(-1, E, (50, 2), dtype=torch.int32), E)
        call = torch.randn(50, 40), weight.tensors, weight.form, torch.randn(E, 2 * part_rows), offsets, tokens
        got, wanted = (module.grouped_gemm(*call, False, False) for module in (ops, reference))
        assert distance(got, wanted) < (4e-2 if form.name.startswith("int") else 1e-5)


@forms
@pytest.mark.some(4)
def test_opcheck(case: FormCase) -> None:
    first, second, (x, topk_ids, weights) = layer_of(case)
    slotted = first.permuted(torch.arange(E)), second.permuted(torch.arange(E))
    for one, other in ((first, second), slotted):
        rest = None, None, topk_ids, weights, "silu", True, False, 1.702, 0.0, True
        args = (x, one.tensors, one.form, other.tensors, other.form, *rest)
        torch.library.opcheck(torch.ops.switchgear.moe_forward.default, args)


@forms
def test_adapted_weights(case: FormCase) -> None:
    """The weight and its adapter act as one weight: W + scale · B·A."""
    first, second, (x, topk_ids, weights) = layer_of(case)
    adapters = [
        AdaptedWeight(weight, torch.randn(E, 3, weight.cols) / 8, torch.randn(E, weight.rows, 3) / 8, 0.5)
        for weight in (first, second)
    ]
    whole = [adapted.weight.plain() + 0.5 * adapted.b @ adapted.a for adapted in adapters]
    with torch.no_grad():
        y = switchgear.moe(x[:, None], *adapters, topk_ids[:, None], weights[:, None])
        assert y.shape == (11, 1, case.hidden_size)
        wanted = switchgear.moe(x, *whole, topk_ids, weights)
    assert distance(y[:, 0], wanted) < (0.03 if isinstance(case.form, (Int4, Int8, GgufForm)) else 1e-5)
    assert adapters[0].shape == first.shape


@forms
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_of_adapted_weights(case: FormCase, dropout: float) -> None:
    """Those of the plain weights that the form represents, up to the rounding of activations for integers; the masks of
    dropout are those of the seed."""
    first, second, (x, topk_ids, weights) = layer_of(case)
    ranks = torch.tensor([3, 0, 2, 3, 1], dtype=torch.int32)

    def adapted(weight: Weight) -> AdaptedWeight:
        a, b = torch.randn(E, 3, weight.cols) / 8, torch.randn(E, weight.rows, 3) / 8
        return AdaptedWeight(weight, a, b, torch.rand(E), ranks, dropout)

    stored = [adapted(first), adapted(second)]
    plain = [weight._replace(weight=weight.weight.plain()) for weight in stored]
    results = []
    for weights_of in (plain, stored):
        leaves = [x.clone(), weights.clone(), *(tensor.clone() for w in weights_of for tensor in (w.a, w.b))]
        x_leaf, weight_leaf, *rest = (leaf.requires_grad_() for leaf in leaves)
        both = [w._replace(a=a, b=b) for w, a, b in zip(weights_of, rest[::2], rest[1::2], strict=True)]
        torch.manual_seed(5)
        y = switchgear.moe(x_leaf, *both, topk_ids, weight_leaf)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for wanted, got in zip(*results, strict=True):
        assert distance(got, wanted) < (0.05 if isinstance(case.form, (Int4, Int8, GgufForm)) else 1e-4)


def test_a_trained_weight_beside_a_stored_one() -> None:
    first, second, call = layer_of(FORM_CASES[5])
    plain = second.plain().requires_grad_()
    with torch.no_grad():
        y = switchgear.moe(call[0], first, plain, *call[1:])
    assert distance(y, switchgear.moe(call[0], first.plain(), second.plain(), *call[1:])) < 1e-5
    leaf = call[0].clone().requires_grad_()
    grads = torch.autograd.grad(switchgear.moe(leaf, first, plain, *call[1:]).square().sum(), (leaf, plain))
    y = switchgear.moe(leaf, first.plain(), plain, *call[1:])
    wanted = torch.autograd.grad(y.square().sum(), (leaf, plain))
    assert all(distance(*pair) < 1e-5 for pair in zip(grads, wanted, strict=True))


# ---- without a kernel ------------------------------------------------------------------------------------------------


def test_no_kernel_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    switchgear.backends._warned_about.clear()
    device = torch.device("cuda")
    with pytest.warns(RuntimeWarning, match="no kernels for int8 weights on cuda: ops run on the reference, slowly"):
        switchgear.backends.announce_format(device, "int8 weights")
    switchgear.backends.announce_format(device, "int8 weights")
    monkeypatch.setenv("SWITCHGEAR_STRICT", "1")
    with raises(RuntimeError):
        switchgear.backends.announce_format(device, "fp8 weights")


@pytest.mark.parametrize("form", ["panels", "compact"])
def test_another_device_says_that_it_expands(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switchgear.weights.weight, "_is_on_cpu", lambda weight: False)
    case = next(case for case in FORM_CASES if case.form.name == form)
    first, second, call = layer_of(case)
    switchgear.backends._warned_about.clear()
    with pytest.warns(RuntimeWarning, match=f"no kernels for {form} weights on cpu: each call expands them, slowly"):
        y = switchgear.moe(call[0], first, second, *call[1:])
    assert torch.equal(y, switchgear.moe(call[0], first.plain(), second.plain(), *call[1:]))
    switchgear.backends._warned_about.clear()
    monkeypatch.setenv("SWITCHGEAR_STRICT", "1")
    with raises(RuntimeError):
        switchgear.moe(call[0], first, second, *call[1:])
