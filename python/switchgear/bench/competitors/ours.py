# SPDX-License-Identifier: BSD-3-Clause
"""switchgear itself."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from switchgear.compress import Format
from switchgear.stored import StoredMatrix

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
    """switchgear.compress.compact: the same weights, bit for bit, in 4 bits fewer each."""
    from switchgear.compress.compact import compacted

    return _stored(case, compacted)


@competitor("switchgear_panels", dtypes=("bf16", "fp32"), modes=("forward",))
def switchgear_panels(case: Case) -> Layer:
    """switchgear.pack_panels: the same weights, in the order in which the kernels read them."""
    from switchgear.panels import in_panels

    return _stored(case, in_panels)


def _stored(case: Case, stored: Callable[[Tensor], StoredMatrix]) -> Layer:
    from switchgear.stored import stored_moe

    first, second = map(stored, case.weights)
    for matrix in (first, second):
        case.on_its_pages(matrix.data)
    return lambda inputs: stored_moe(inputs.x, first, second, inputs.topk_ids, inputs.topk_weights, activation="silu")


def _quantized(case: Case, format: Format) -> Layer:
    from switchgear.compress.formats import QuantizedMatrix, quantized_moe
    from switchgear.compress.quantize import quantized_weight

    def matrix(weight: Tensor, parts: int) -> QuantizedMatrix:
        blocks = quantized_weight(weight, parts, format)
        for tensor in blocks:
            if tensor is not None:
                case.on_its_pages(tensor)
        return QuantizedMatrix(blocks, weight.shape[1], weight.shape[2], parts, format)

    first, second = (matrix(weight, parts) for weight, parts in zip(case.weights, (2, 1), strict=True))
    return lambda inputs: quantized_moe(
        inputs.x, first, second, inputs.topk_ids, inputs.topk_weights, activation="silu"
    )


@competitor("switchgear_int8", dtypes=("int8",), modes=("forward",))
def switchgear_int8(case: Case) -> Layer:
    """switchgear.compress.quantize(…, "int8")."""
    return _quantized(case, Format("int8"))


@competitor("switchgear_int4", dtypes=("int4",), modes=("forward",))
def switchgear_int4(case: Case) -> Layer:
    """switchgear.compress.quantize(…, "int4", symmetric=False): 4.5 bits, as q4_0 and q4_K of ggml."""
    return _quantized(case, Format("int4", symmetric=False))
