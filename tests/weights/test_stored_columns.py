# SPDX-License-Identifier: BSD-3-Clause
"""moe_backward with stored weights has the bits of the same weights in plain: equal values and order of sums."""

from __future__ import annotations

import math

import pytest
import torch

from switchgear import ops
from switchgear.testing import Case, GluOptions, make_layer
from switchgear.weights import Form, Fp8, Int4, Int8, Mxfp4, Nf4, Weight, encode

FORMS = (
    Int8(group_size=64, symmetric=False),
    Int8(),
    Int4(),
    Int4(group_size=16, symmetric=False),
    Int4(group_size=32),
    Int4(group_size=64, symmetric=False),
    Fp8(block="row"),
    Fp8(),
    Mxfp4(),
    Nf4(),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Columns past the last whole panel, rows past the last whole block, and more rows than a slice of the depth has.
CASES = (
    Case("deep", 20, 2, 3, 328, 176),
    Case("padded_parts", 20, 2, 3, 136, 40),  # gates and ups end in the middle of a block
    Case("many_rows", 300, 1, 1, 64, 32),
    Case("one_token", 1, 2, 4, 128, 64),
)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_of_plain_weights(isa: str, case: Case, form: Form) -> None:
    for dtype in DTYPES:
        layer, options = make_layer(case, dtype), GluOptions()
        weights = [encode(w, form, parts=parts) for w, parts in ((layer.gate_up_proj, 2), (layer.down_proj, 1))]
        assert all(isinstance(weight, Weight) for weight in weights)
        grad_y, h = (
            torch.randn(layer.x.shape).to(dtype),
            torch.randn(layer.topk_ids.numel(), 2 * case.intermediate_size),
        )
        rest = (None, None, layer.topk_ids, layer.topk_weights, *options, [True, False, False, False, False, True])
        plain = [argument for weight in weights for argument in ([weight.plain().to(dtype)], ())]
        stored = [argument for weight in weights for argument in (weight.tensors, weight.form)]
        wanted = ops.moe_backward(grad_y, layer.x, h.to(dtype), *plain, *rest)
        got = ops.moe_backward(grad_y, layer.x, h.to(dtype), *stored, *rest)
        for name, place in (("x", 0), ("topk_weights", 5)):
            assert torch.equal(got[place], wanted[place]), f"gradient of {name}, {dtype}"


def test_padding_may_be_nan(isa: str) -> None:
    """Rows past the last one share a pair of bfloat16 with it."""
    layer = make_layer(Case("odd", 5, 2, 3, 33, 24), torch.bfloat16)
    down_proj = encode(layer.down_proj, Fp8(block="row"), parts=1)
    assert isinstance(down_proj, Weight)
    plain = down_proj.plain().to(torch.bfloat16)
    down_proj.scales[:, -1, :, 33 % 16 :] = math.nan  # type: ignore[index]
    grad_y = torch.randn(layer.x.shape).to(torch.bfloat16)
    h = torch.randn(layer.topk_ids.numel(), 48).to(torch.bfloat16)
    rest = (None, None, layer.topk_ids, layer.topk_weights, *GluOptions(), [True, False, False, False, False, True])
    wanted = ops.moe_backward(grad_y, layer.x, h, [layer.gate_up_proj], (), [plain], (), *rest)
    tensors, form = down_proj.tensors, down_proj.form
    got = ops.moe_backward(grad_y, layer.x, h, [layer.gate_up_proj], (), tensors, form, *rest)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[5], wanted[5])
