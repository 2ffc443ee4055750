# SPDX-License-Identifier: BSD-3-Clause
"""switchgear itself, on weights in each form that it stores."""

from __future__ import annotations

from typing import Any

from switchgear import moe, weights

from ..case import Case, Layer
from .registry import COMPETITORS, DECODED, Competitor, competitor


@competitor("switchgear", dtypes=DECODED)
def switchgear(case: Case) -> Layer:
    """switchgear.moe on plain weights."""
    return _layer(case.gate_up_proj, case.down_proj)


def _layer(gate_up: Any, down: Any) -> Layer:
    return lambda inputs: moe(inputs.x, gate_up, down, inputs.topk_ids, inputs.topk_weights, activation="silu")


def _stored(case: Case, form: str, **options: Any) -> Layer:
    gate_up, down = (
        weights.encode(weight, form, parts=parts, **options)
        for weight, parts in zip(case.weights, (2, 1), strict=True)  # gates precede ups
    )
    for weight in (gate_up, down):
        for tensor in weight.tensors:
            case.on_its_pages(tensor)
    return _layer(gate_up, down)


@competitor("switchgear_compact", dtypes=("bf16", "fp32"), modes=("forward",))
def switchgear_compact(case: Case) -> Layer:
    """weights stored as "compact": the same, bit for bit, in 4 bits fewer each."""
    return _stored(case, "compact")


@competitor("switchgear_panels", dtypes=("bf16", "fp32"), modes=("forward",))
def switchgear_panels(case: Case) -> Layer:
    """weights stored as "panels": the same, in the order in which the kernels read them."""
    return _stored(case, "panels")


@competitor("switchgear_int8", dtypes=("int8",), modes=("forward",))
def switchgear_int8(case: Case) -> Layer:
    """weights stored as "int8", a scale per row."""
    return _stored(case, "int8")


@competitor("switchgear_int4", dtypes=("int4",), modes=("forward",))
def switchgear_int4(case: Case) -> Layer:
    """weights stored as "int4", symmetric=False: 4.5 bits, as q4_0 and q4_K of ggml."""
    return _stored(case, "int4", symmetric=False)


def _as_stored(case: Case) -> Layer:
    """The weights of a case that has them in a form already."""
    assert case.stored is not None
    return _layer(*case.stored)


COMPETITORS |= {
    f"switchgear_{format}": Competitor(_as_stored, (format,), ("forward",), True, f"weights stored as {about}.")
    for format, about in {
        **{f"groups{bits}": f'"groups" of {bits} bits, a scale for 128 columns' for bits in (4, 3, 2)},
        "groups1": '"groups" of 1 bit, a scale for 128 columns',
        "fp8": '"fp8", a scale for 128 x 128',
        "mxfp4": '"mxfp4", a scale for 32 columns',
    }.items()
}
