# SPDX-License-Identifier: BSD-3-Clause
"""Groups: decoding by the formula, the storage bit by bit, bits per expert, and what is refused. The common tests of
forms, in test_forms.py, and tests/cpp/test_groups.cpp have the rest."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
from form_cases import distance, inputs, make_experts
from torch import Tensor

import switchgear
from backends_in_use import ISAS, SIMT_DEVICES, backend_named
from errors import raises
from switchgear.reference import groups
from switchgear.weights import Groups, Weight, encode
from switchgear.weights.integers import weight_of

MIXED = (1, 2, 3, 4, 3)


@pytest.fixture(params=["reference", *ISAS, *SIMT_DEVICES])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with backend_named(request.param):
        yield request.param


def random_levels(bits: tuple[int, ...], rows: int, columns: int, size: int, zeros: bool = True) -> groups.Levels:
    shape = len(bits), rows, -(-columns // size)
    q = torch.stack([torch.randint(1 << b, (rows, columns)) for b in bits]).to(torch.uint8)
    zero = torch.stack([torch.randint((1 << b) + 1, shape[1:]) for b in bits]).to(torch.uint8)
    return groups.Levels(q, torch.randn(shape).half(), zero if zeros else None, bits)


def decoded_in_float64(levels: groups.Levels, size: int) -> Tensor:
    experts, rows, columns = levels.q.shape
    out = torch.empty(levels.q.shape, dtype=torch.float64)
    for e, r, c in itertools.product(range(experts), range(rows), range(columns)):
        bits, q = levels.bits[e], int(levels.q[e, r, c])
        zero = 1 << (bits - 1) if levels.zeros is None else int(levels.zeros[e, r, c // size])
        out[e, r, c] = float(levels.scales[e, r, c // size]) * (2 * q - 1 if bits == 1 else q - zero)
    return out


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("rows", "columns", "size", "parts"), [(18, 71, 32, 2), (5, 128, 64, 1), (33, 96, 96, 1)])
def test_decoding_is_the_formula(rows: int, columns: int, size: int, parts: int, zeros: bool) -> None:
    levels = random_levels(MIXED, rows, columns, size, zeros)
    wanted = decoded_in_float64(levels, size)
    assert torch.equal(groups.dequantize(levels, size).double(), wanted)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = weight_of(levels, dtype, size, parts=parts)
        assert torch.equal(weight.plain(), wanted.to(dtype))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_storage_bit_by_bit(bits: int) -> None:
    levels = random_levels((4, bits), 20, 40, 32)
    stored = groups.to_blocks(levels)
    assert stored.records.tolist() == [[0, 4], [4, bits]]
    record = stored.data[4:].reshape(2, 2, 64 * bits)  # blocks, steps, bytes
    for row, column in itertools.product(range(20), range(40)):
        step = record[row // 16, column // 32].tolist()
        i, half, code = column % 32 // 2, column % 2, int(levels.q[1, row, column]) ^ 1 << (bits - 1)
        for bit in range(bits):
            vector, place = i * bits // 16, (i * bits + bit) % 16
            if bits == 3:
                vector, place = (bit, 15) if i == 15 else (i // 5, i % 5 * 3 + bit)
            byte = step[64 * vector + 4 * (row % 16) + 2 * half + place // 8]
            assert byte >> place % 8 & 1 == code >> bit & 1, (row, column, bit)
    assert torch.equal(groups.from_blocks(stored, 20, 40).q, levels.q)


@pytest.mark.parametrize("symmetric", [True, False])
def test_experts_are_quantised_each_for_itself(symmetric: bool) -> None:
    torch.manual_seed(1)
    for shape, bits in (((6, 6, 40), (3, 3, 2, 1, 1, 3)), ((3, 3000, 48), (2, 2, 4))):
        weight = torch.randn(shape)
        together = groups.quantize(weight, bits, 16, symmetric)
        alone = [
            groups.quantize(expert[None], [b], 16, symmetric)
            for expert, b in zip(weight.mT.contiguous().mT, bits, strict=True)
        ]
        for got, *parts in zip(together[:3], *(levels[:3] for levels in alone), strict=True):
            assert (got is None) == (parts[0] is None)
            assert got is None or torch.equal(got, torch.cat(parts))


def test_fit_is_no_worse_than_the_whole_range() -> None:
    w = torch.randn(50, 3, 32)
    w[..., 0] *= 3  # an outlier, which is better clipped
    present = torch.ones(3, 32, dtype=torch.bool)
    scale, _ = groups.fit(w, present, 1, True)
    assert torch.equal(scale, w.abs().mean(-1).half())
    for bits, symmetric in itertools.product((2, 3, 4), (True, False)):
        scale, zero = groups.fit(w, present, bits, symmetric)
        levels = groups.round_to_levels(w, scale, zero, bits).float()
        error = ((levels - zero[..., None].float()) * scale.float()[..., None] - w).square().sum(-1)
        low, high = w.amin(-1), w.amax(-1)
        if symmetric:
            plain = torch.where(high > -low, -high, -low) / 2 ** (bits - 1)
            middle = torch.full_like(plain, 2 ** (bits - 1))
        else:
            plain = (high - low) / (2**bits - 1)
            middle = (-low / plain).round()
        q = (w / plain[..., None] + middle[..., None]).round().clamp(0, 2**bits - 1)
        naive = ((q - middle[..., None]) * plain[..., None] - w).square().sum(-1)
        assert float((error / naive).max()) < 1.01  # the scale is rounded to 11 bits
        assert float(error.sum()) < 0.95 * float(naive.sum())


def test_each_expert_has_the_results_of_its_bits(backend: str) -> None:
    """An expert's rows do not depend on the bits of the others, nor on where its planes are."""
    weight = torch.randn(len(MIXED), 40, 100)
    x, offsets = torch.randn(20, 100), torch.tensor([0, 3, 3, 11, 19, 20], dtype=torch.int32)
    mixed = encode(weight, "groups", bits=MIXED, group_size=32, symmetric=False)
    got = switchgear.grouped_gemm(x, mixed, offsets)
    for expert, bits in enumerate(MIXED):
        rows = slice(int(offsets[expert]), int(offsets[expert + 1]))
        alone = encode(weight, "groups", bits=bits, group_size=32, symmetric=False)
        assert torch.equal(got[rows], switchgear.grouped_gemm(x, alone, offsets)[rows])
        wanted = x[rows].double() @ mixed.plain()[expert].double().mT
        assert distance(got[rows], wanted) < 1e-5 or rows.start == rows.stop
    order = torch.tensor([3, 0, 0, 2, 4])
    moved = switchgear.grouped_gemm(x, mixed.permuted(order), offsets)
    copied = encode(weight[order], "groups", bits=[MIXED[i] for i in order], group_size=32, symmetric=False)
    assert torch.equal(moved, switchgear.grouped_gemm(x, copied, offsets))


def test_layers_and_gradients_of_mixed_bits(backend: str) -> None:
    experts = make_experts(96, 40, dtype=torch.float32)
    stored = copy.deepcopy(experts)
    report = switchgear.store(stored, "groups", bits=MIXED, group_size=32)
    assert not report.lossless
    planes = sum(MIXED) * 64 * (2 * 3 * 3 + 6 * 2)  # blocks of 16 rows times steps of 32 columns
    scales = 5 * 2 * 16 * (2 * 3 * 3 + 6 * 2)
    assert report.bytes_after == planes + scales + 2 * 5 * 8  # and records
    plain = copy.deepcopy(stored)
    switchgear.restore(plain)
    x, ids, weights = inputs(9, 96, torch.float32)
    results = []
    for module in (stored, plain):
        own = x.clone().requires_grad_()
        y = module(own, ids, weights)
        y.square().sum().backward()
        results.append((y, own.grad))
    for got, wanted in zip(*results, strict=True):
        assert distance(got, wanted) < 1e-5


def test_state_dicts_of_mixed_bits() -> None:
    experts = make_experts(96, 40)
    first, second = copy.deepcopy(experts), copy.deepcopy(experts)
    switchgear.store(first, "groups", bits=MIXED)
    switchgear.store(second, Groups(bits=MIXED[::-1]))
    with raises(ValueError, "gate_up_proj_bits"):
        second.load_state_dict(first.state_dict())
    broken = first.state_dict()
    broken["gate_up_proj_scales"] = broken["gate_up_proj_scales"].clone().fill_(torch.inf)
    with raises(ValueError, "gate_up_proj_scales"):
        first.load_state_dict(broken)
    assert first.half().state_dict()["down_proj_scales"].dtype is torch.float16


@pytest.mark.parametrize("record", [[0, 0], [0, 5], [-1, 3], [1, 4], [2**31 - 4, 4]])
def test_records_outside_the_data_are_refused(backend: str, record: list[int]) -> None:
    weight = encode(torch.randn(2, 16, 32), "groups", bits=2, group_size=32)
    assert weight.records is not None
    records = weight.records.clone()
    records[1] = torch.tensor(record)
    x, offsets = torch.randn(2, 32), torch.tensor([0, 1, 2], dtype=torch.int32)
    with raises(ValueError, "weight_records"):
        switchgear.grouped_gemm(x, weight.with_tensors({"records": records}), offsets)
    for wrong in (weight.records.long(), weight.records[:1], weight.records[:, :1], None):
        with raises((ValueError, TypeError)):
            switchgear.grouped_gemm(x, weight.with_tensors({"records": wrong}), offsets)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_weights_that_would_become_zero_are_refused(bits: int, symmetric: bool) -> None:
    """All of an expert, not a group of it. Small scales, which float16 holds with few bits, lose little."""
    form = Groups(bits=bits, group_size=32, symmetric=symmetric)
    weight = torch.randn(3, 20, 96)
    small = [distance(encode(weight * scale, form).plain(), weight * scale) for scale in (1.0, 1e-5)]
    assert small[1] < 1.02 * small[0]
    weight[1, 17, 32:64] = 0
    assert not encode(weight, form).plain()[1, 17, 32:64].any()
    weight[1, 17, 40] = 1e-8  # what is left of pruning
    assert not encode(weight, form).plain()[1, 17, 32:64].any()
    weight[1] *= 1e-9
    with raises(ValueError):
        encode(weight, form)


def test_options() -> None:
    for options, argument in (
        ({"bits": 0}, "bits"),
        ({"bits": 5}, "bits"),
        ({"bits": (3, 9)}, "bits"),
        ({"group_size": 48}, "group_size"),
    ):
        with raises(ValueError, argument):
            Groups(**options)  # type: ignore[arg-type]
    with raises(ValueError, "bits"):
        encode(torch.randn(3, 8, 32), Groups(bits=[2, 3]))
    with raises(ValueError):
        encode(torch.tensor([1.0, 1e8]).view(2, 1, 1).expand(2, 8, 32), Groups())
    assert Groups(bits=[2, 3]) == Groups(bits=(2, 3))
    assert isinstance(encode(torch.zeros(1, 8, 32), Groups(bits=3)), Weight)
