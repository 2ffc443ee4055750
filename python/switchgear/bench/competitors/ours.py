# SPDX-License-Identifier: BSD-3-Clause
"""switchgear itself, on weights in each form that it stores."""

from __future__ import annotations

from typing import Any

from ..case import Case, Layer
from .registry import DECODED, competitor


@competitor("switchgear", dtypes=DECODED)
def switchgear(case: Case) -> Layer:
    """switchgear.moe on plain weights."""
    from switchgear import moe

    return lambda inputs: moe(
        inputs.x, case.gate_up_proj, case.down_proj, inputs.topk_ids, inputs.topk_weights, activation="silu"
    )


def _stored(case: Case, form: str, **options: Any) -> Layer:
    from switchgear import moe, weights

    gate_up, down = (
        weights.encode(weight, form, parts=parts, **options)
        for weight, parts in zip(case.weights, (2, 1), strict=True)  # gates precede ups
    )
    for weight in (gate_up, down):
        for tensor in weight.tensors:
            case.on_its_pages(tensor)
    return lambda inputs: moe(inputs.x, gate_up, down, inputs.topk_ids, inputs.topk_weights, activation="silu")


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
    from switchgear import moe

    assert case.stored is not None
    gate_up, down = case.stored
    return lambda inputs: moe(inputs.x, gate_up, down, inputs.topk_ids, inputs.topk_weights, activation="silu")


@competitor("switchgear_groups4", dtypes=("groups4",), modes=("forward",))
def switchgear_groups4(case: Case) -> Layer:
    """weights stored as "groups" of 4 bits, a scale for 128 columns."""
    return _as_stored(case)


@competitor("switchgear_groups3", dtypes=("groups3",), modes=("forward",))
def switchgear_groups3(case: Case) -> Layer:
    """weights stored as "groups" of 3 bits, a scale for 128 columns."""
    return _as_stored(case)


@competitor("switchgear_groups2", dtypes=("groups2",), modes=("forward",))
def switchgear_groups2(case: Case) -> Layer:
    """weights stored as "groups" of 2 bits, a scale for 128 columns."""
    return _as_stored(case)


@competitor("switchgear_groups1", dtypes=("groups1",), modes=("forward",))
def switchgear_groups1(case: Case) -> Layer:
    """weights stored as "groups" of 1 bit, a scale for 128 columns."""
    return _as_stored(case)


@competitor("switchgear_fp8", dtypes=("fp8",), modes=("forward",))
def switchgear_fp8(case: Case) -> Layer:
    """weights stored as "fp8", a scale for 128 x 128."""
    return _as_stored(case)


@competitor("switchgear_mxfp4", dtypes=("mxfp4",), modes=("forward",))
def switchgear_mxfp4(case: Case) -> Layer:
    """weights stored as "mxfp4", a scale for 32 columns."""
    return _as_stored(case)
