# SPDX-License-Identifier: BSD-3-Clause
"""switchgear itself."""

from __future__ import annotations

from switchgear.weights import Form, Int4, encode

from ..case import Case, Layer
from .registry import competitor


@competitor("switchgear")
def switchgear(case: Case) -> Layer:
    """switchgear.moe."""
    from switchgear import moe

    return lambda inputs: moe(
        inputs.x, case.gate_up_proj, case.down_proj, inputs.topk_ids, inputs.topk_weights, activation="silu"
    )


@competitor("switchgear_compact", dtypes=("bf16", "fp32"), modes=("forward",))
def switchgear_compact(case: Case) -> Layer:
    """switchgear.store(…, "compact"): the same weights, bit for bit, in 4 bits fewer each."""
    return _stored(case, "compact")


@competitor("switchgear_panels", dtypes=("bf16", "fp32"), modes=("forward",))
def switchgear_panels(case: Case) -> Layer:
    """switchgear.store(…, "panels"): the same weights, in the order in which the kernels read them."""
    return _stored(case, "panels")


@competitor("switchgear_int8", dtypes=("int8",), modes=("forward",))
def switchgear_int8(case: Case) -> Layer:
    """switchgear.store(…, "int8")."""
    return _stored(case, "int8")


@competitor("switchgear_int4", dtypes=("int4",), modes=("forward",))
def switchgear_int4(case: Case) -> Layer:
    """switchgear.store(…, "int4", symmetric=False): 4.5 bits, as q4_0 and q4_K of ggml."""
    return _stored(case, Int4(symmetric=False))


def _stored(case: Case, form: str | Form) -> Layer:
    from switchgear import moe

    first, second = (encode(weight, form, parts=parts) for weight, parts in zip(case.weights, (2, 1), strict=True))
    for weight in (first, second):
        for tensor in weight.tensors:
            case.on_its_pages(tensor)
    return lambda inputs: moe(inputs.x, first, second, inputs.topk_ids, inputs.topk_weights, activation="silu")
