# SPDX-License-Identifier: BSD-3-Clause
"""GGUF's block types: decoded to the bits of ggml, encoded, and multiplied."""

from __future__ import annotations

import copy
import hashlib
import itertools
import pickle

import pytest
import torch
from form_cases import distance
from torch import Tensor

import switchgear
from errors import raises
from switchgear import weights
from switchgear.reference import gguf
from switchgear.weights.form import FORMS
from switchgear.weights.gguf import gguf_weight

# Of gguf-py 0.19: `dequantize` of blocks_of(name, 512), one NaN for all; `quantize` of numbers_of(name), if any.
DIGESTS = {
    "q8_0": ("ba2d0563bca95596", "f4900d2d5b8f7feb"),
    "q4_0": ("65723facff0d39fc", "53e44427c6e6d236"),
    "q4_1": ("d621c928ce8c17be", "6e114b91e1c6cb67"),
    "q5_0": ("63d438285427775a", "5831c56b534a8898"),
    "q5_1": ("2767fb20f021417a", "ab5053ab3a8c886c"),
    "iq4_nl": ("427ef779eb76b68f", None),
    "mxfp4_gguf": ("ebcf84d167d6e065", "a16cc6751dea4ba9"),
    "q2_k": ("5994185003eae69c", None),
    "q3_k": ("9a51c1839b6e6b0b", None),
    "q4_k": ("b62298b58f538d03", None),
    "q5_k": ("db9a409738d327e1", None),
    "q6_k": ("536b979e8e5477be", None),
    "iq4_xs": ("c0c65cf6931b0d39", None),
}
# Of an encoded weight of normally distributed numbers, in the 2-norm.
ERRORS = {
    "q8_0": 0.006, "q4_0": 0.09, "q4_1": 0.085, "q5_0": 0.045, "q5_1": 0.04, "iq4_nl": 0.078, "mxfp4_gguf": 0.12,
    "q2_k": 0.29, "q3_k": 0.15, "q4_k": 0.075, "q5_k": 0.038, "q6_k": 0.018, "iq4_xs": 0.078,
}  # fmt: skip
ROUNDING = 0.01  # of activations in products, relative in the 2-norm
types = pytest.mark.parametrize("name", gguf.TYPES)


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(bytes(tensor.contiguous().view(torch.uint8).numpy())).hexdigest()[:16]


def blocks_of(name: str, count: int) -> Tensor:
    """Blocks of any bits, so that some scales are infinite or NaN."""
    kind = gguf.TYPES[name]
    return torch.randint(
        0, 256, (count, kind.bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(kind.ggml)
    )


def numbers_of(name: str) -> Tensor:
    columns = 2 * gguf.TYPES[name].columns
    return torch.randint(-1000, 1001, (64, columns), generator=torch.Generator().manual_seed(1)).float() / 512


@types
def test_values_have_the_bits_of_ggml(name: str) -> None:
    values = gguf.decode(name, blocks_of(name, 512))
    assert digest(torch.where(values.isnan(), torch.nan, values)) == DIGESTS[name][0]


@types
def test_encoded_blocks(name: str) -> None:
    wanted = DIGESTS[name][1]
    assert wanted is None or digest(gguf.encode(name, numbers_of(name))) == wanted
    torch.manual_seed(0)
    for weight in (torch.randn(16, 512), torch.randn(16, 512) * 1e-3, torch.randn(16, 512) * 1e4):
        assert distance(gguf.decode(name, gguf.encode(name, weight)), weight) < ERRORS[name]
    assert not gguf.decode(name, gguf.encode(name, torch.zeros(1, 512))).any()


def weight_of(
    name: str, num_experts: int, rows: int, columns: int, dtype: torch.dtype, parts: int = 1
) -> weights.Weight:
    torch.manual_seed(gguf.TYPES[name].ggml)
    return weights.encode((torch.randn(num_experts, rows, columns) / columns**0.5).to(dtype), name, parts=parts)


def times(x: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
    """In float64, whose roundings do not count."""
    offsets = expert_offsets.tolist()
    pairs = itertools.pairwise(offsets)
    return torch.cat([x[a:b].double() @ weight[e].double().mT for e, (a, b) in enumerate(pairs)])


@types
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products(backend: str, name: str, dtype: torch.dtype) -> None:
    """Forward and the gradient of x; with no row, one, a few and many, and a part of a tile."""
    weight = weight_of(name, 4, 37, 768, dtype)
    offsets = torch.tensor([0, 0, 1, 8, 60], dtype=torch.int32)
    x = torch.randn(60, 768, dtype=dtype, requires_grad=True)
    bias, grad = torch.randn(4, 37, dtype=dtype), torch.randn(60, 37, dtype=dtype)
    y = switchgear.grouped_gemm(x, weight, offsets, bias=bias)
    y.backward(grad)
    plain = weight.with_tensors({}).plain().float() if dtype is torch.float32 else gguf.decode(name, weight.data[:, 0])
    wanted = times(gguf.round_rows(name, x.detach()), plain, offsets)
    assert distance(wanted, times(x.detach(), plain, offsets)) < ROUNDING
    wanted = wanted + bias.double().repeat_interleave(offsets.diff(), 0)
    assert x.grad is not None
    epsilon = torch.finfo(dtype).eps
    assert distance(y, wanted) < max(epsilon, 1e-6)
    assert distance(x.grad, times(grad, plain.mT, offsets)) < 2 * max(epsilon, 1e-6)


@types
def test_a_row_does_not_depend_on_others(isa: str, name: str) -> None:
    weight = weight_of(name, 1, 19, 512, torch.float32)
    x = torch.randn(50, 512)
    whole = switchgear.linear(x, weight)
    for begin, count in ((0, 1), (3, 2), (7, 6), (11, 7), (13, 30)):
        assert torch.equal(switchgear.linear(x[begin : begin + count], weight), whole[begin : begin + count])


@pytest.mark.parametrize(
    ("first", "second"), [("q4_k", "q6_k"), ("q8_0", "q5_1"), ("iq4_xs", "mxfp4_gguf"), ("q4_0", None)]
)
def test_experts_whose_gates_and_ups_are_apart(backend: str, first: str, second: str | None) -> None:
    """In one file they are two tensors, anywhere. Projections may have different types, or be plain."""
    gates, ups = (weight_of(first, 4, 256, 256, torch.float32).data for _ in range(2))
    file = torch.randint(0, 256, (64 + 2 * gates.numel() + 999,), dtype=torch.uint8)
    begins = 32, 64 + gates.numel() + 7
    for begin, tensor in zip(begins, (gates, ups), strict=True):
        file[begin : begin + tensor.numel()] = tensor.flatten()
    size = gates[0].numel()
    shape, strides = (4, 2, 256, gates.shape[3]), (size, begins[1] - begins[0], gates.shape[3], 1)
    gate_up = gguf_weight(first, file[32:].as_strided(shape, strides), 256, torch.float32)
    down = torch.randn(4, 256, 256) / 16 if second is None else weight_of(second, 4, 256, 256, torch.float32)
    assert gate_up.parts == 2
    x, ids, scores = torch.randn(33, 256), torch.rand(33, 4).argsort(-1)[:, :2].int(), torch.rand(33, 2)
    plain = gate_up.plain(), down if isinstance(down, Tensor) else down.plain()
    x.requires_grad_()
    y, wanted = switchgear.moe(x, gate_up, down, ids, scores), switchgear.moe(x, *plain, ids, scores)
    assert distance(y, wanted) < 2 * ROUNDING
    grads = [torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for out in (y, wanted)]
    assert distance(*grads) < 2 * ROUNDING


@types
def test_any_bits(isa: str, name: str) -> None:
    """Infinite and NaN scales reach the rows that use them, and no others. mxfp4 has none: its values overflow, and
    products of them that float32 holds may be finite, but then they are right."""
    kind = gguf.TYPES[name]
    data = blocks_of(name, 64 * 512 // kind.columns).view(1, 1, 64, -1)
    weight = gguf_weight(name, data, 512, torch.float32)
    x = torch.randn(9, 512)
    y, plain = switchgear.linear(x, weight), weight.plain()[0]
    is_large, is_small = ~plain.isfinite().all(1), plain.abs().amax(1) < 1e30
    rounded = gguf.round_rows(name, x).double()
    if name == "mxfp4_gguf":
        blocks = data.clone().unflatten(-1, (-1, kind.bytes))
        blocks[..., 0] -= blocks[..., 0].clamp(max=16)  # exponents, smaller by 16
        wide = gguf_weight(name, blocks.flatten(-2), 512, torch.float32).plain()[0].double() * 2.0**16
        want, got = (rounded @ wide.mT)[:, is_large], y[:, is_large].double()
        assert distance(got[got.isfinite()], want[got.isfinite()]) < 1e-6
    else:
        assert not y[:, is_large].isfinite().any()
    assert distance(y[:, is_small], rounded @ plain[is_small].double().mT) < 1e-6


def test_columns_are_whole_blocks() -> None:
    with raises(ValueError, "weight"):
        weights.encode(torch.randn(2, 3, 128), "q4_k")
    weight = weight_of("q4_k", 2, 3, 256, torch.float32)
    for wrong in (weight.data[..., :-1], weight.data[..., ::2], weight.data.mT, weight.data[0]):
        with raises(ValueError, "weight"):
            switchgear.linear(torch.randn(2, 256), gguf_weight("q4_k", wrong, 256, torch.float32).with_tensors({}))


def test_forms_are_copied_and_pickled() -> None:
    for name in gguf.TYPES:
        form = FORMS[name]()
        assert pickle.loads(pickle.dumps(form)) == copy.deepcopy(form) == form
        assert str(form) == name
