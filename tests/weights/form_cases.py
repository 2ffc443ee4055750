# SPDX-License-Identifier: BSD-3-Clause
"""Forms to test, with their requirements and guarantees, and small experts for them."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import switchgear
from switchgear.weights import Compact, Form, Fp8, Groups, Int4, Int8, Mxfp4, Nf4, Nvfp4, Panels, Weight
from switchgear.weights.form import FORMS

E, K = 5, 2
LOW, FULL = torch.bfloat16, torch.float32


class FormCase(NamedTuple):
    form: Form
    dtypes: tuple[torch.dtype, ...]
    error: float  # of a layer's output, relative in the 2-norm; 0: the same bits as plain weights
    hidden_size: int = 128
    intermediate_size: int = 64

    def __str__(self) -> str:
        return str(self.form)

    @property
    def is_exact(self) -> bool:
        return self.error == 0

    def experts(self, **options: Any) -> switchgear.Experts:
        return make_experts(self.hidden_size, self.intermediate_size, **options)

    def stored(self, experts: switchgear.Experts) -> switchgear.Experts:
        """A copy of experts in this form."""
        stored = copy.deepcopy(experts)
        switchgear.store(stored, self.form)
        return stored

    def inputs(self, num_tokens: int, dtype: torch.dtype = LOW) -> tuple[Tensor, Tensor, Tensor]:
        return inputs(num_tokens, self.hidden_size, dtype)


def make_experts(hidden_size: int, intermediate_size: int, **options: Any) -> switchgear.Experts:
    experts = switchgear.Experts(hidden_size, intermediate_size, E, **{"dtype": LOW} | options)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    return experts


def inputs(num_tokens: int, hidden_size: int, dtype: torch.dtype = LOW) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.rand(num_tokens, E).argsort(-1)[:, :K].int()
    return torch.randn(num_tokens, hidden_size).to(dtype), ids, torch.rand(num_tokens, K)


ALL = (LOW, FULL, torch.float16)
FORM_CASES = (
    FormCase(Panels(), ALL, 0, 512, 384),
    FormCase(Compact(), (LOW, FULL), 0, 512, 384),
    FormCase(Int8(), ALL, 0.03),
    FormCase(Int4(), ALL, 0.2),
    FormCase(Int4(group_size=16, symmetric=False), ALL, 0.15),
    FormCase(Fp8(), ALL, 0.08),
    FormCase(Fp8(block="row"), ALL, 0.08),
    FormCase(Fp8(block="64x128"), ALL, 0.08),
    FormCase(Mxfp4(), ALL, 0.35),
    FormCase(Nf4(), ALL, 0.3),
    FormCase(Nvfp4(), ALL, 0.3),
    FormCase(Groups(bits=4, group_size=32), ALL, 0.2),
    FormCase(Groups(bits=3, group_size=64, symmetric=False), ALL, 0.45),
    FormCase(Groups(bits=1, group_size=32), ALL, 1.2),
    FormCase(FORMS["q5_1"](), ALL, 0.1),
    FormCase(FORMS["q4_k"](), ALL, 0.2, 256, 256),
    FormCase(FORMS["q6_k"](), ALL, 0.06, 256, 256),
)
forms = pytest.mark.parametrize("case", FORM_CASES, ids=str)
exact_forms = pytest.mark.parametrize("case", [case for case in FORM_CASES if case.is_exact], ids=str)
forms_and_dtypes = pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(c, d, id=f"{c}-{str(d).removeprefix('torch.')}") for c in FORM_CASES for d in c.dtypes],
)


def in_records(weight: Weight, slots: list[int], count: int | None = None, seen: Tensor | None = None) -> Weight:
    """The same experts in one arena: record slots[e] has all tensors of expert e, at multiples of 64 bytes; the other
    bytes are 0xff. count: records; seen: the slots that the weight then has."""
    if weight.slots is not None:
        at = weight.slots.long()
        names = ("scales", "row_scales", "zeros", "records" if weight.records is not None else "data")
        moved = {name: None if (tensor := getattr(weight, name)) is None else tensor[at] for name in names}
        weight = weight.with_tensors({**moved, "slots": None})
    parts: dict[str, list[Tensor]] = {}  # by field, of each expert
    for name in ("data", "scales", "row_scales", "zeros"):
        if (tensor := getattr(weight, name)) is not None:
            parts[name] = list(tensor)
    bits = [1] * len(slots)
    if weight.records is not None:
        bits = [count for _, count in weight.records.tolist()]
        parts["data"] = [weight.data[first : first + count] for first, count in weight.records.tolist()]
    begins, record = {}, 0
    for name, tensors in parts.items():
        begins[name] = record
        record += -(-max(tensor.nbytes for tensor in tensors) // 64) * 64
    record += 64
    count = count or max(slots) + 2
    arena = torch.full((count * record,), 0xFF, dtype=torch.uint8)
    fields: dict[str, Tensor | None] = {"slots": torch.tensor(slots, dtype=torch.int32) if seen is None else seen}
    if weight.records is not None:
        places = [[index * record // 64, 1] for index in range(count)]
        for slot, number in zip(slots, bits, strict=True):
            places[slot][1] = number
        fields["records"] = torch.tensor(places, dtype=torch.int32)
    for name, tensors in parts.items():
        inner, dtype = getattr(weight, name)[0], tensors[0].dtype
        unit = 64 if name == "data" and weight.records is not None else record
        shape = ((arena.numel() - begins[name] - inner.nbytes) // unit + 1, *inner.shape)
        strides = (unit // inner.itemsize, *inner.stride())
        memory = arena[begins[name] :].view(dtype)
        for slot, tensor in zip(slots, tensors, strict=True):
            at = slot * record // inner.itemsize
            memory[at : at + tensor.numel()] = tensor.flatten()
        fields[name] = memory.as_strided(shape, strides)
    return weight.with_tensors(fields)


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = {2: torch.int16, 4: torch.int32}[a.itemsize]
    return a.dtype is b.dtype and torch.equal(a.view(bits), b.view(bits))


def distance(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))
