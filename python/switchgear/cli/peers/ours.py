# SPDX-License-Identifier: BSD-3-Clause
"""switchgear itself."""

from __future__ import annotations

from ..bench_case import Case, Layer
from .registry import Skip, peer


@peer("switchgear")
def switchgear(case: Case) -> Layer:
    """switchgear.moe."""
    from switchgear import moe

    return lambda inputs: moe(
        inputs.x, case.gate_up_proj, case.down_proj, inputs.topk_ids, inputs.topk_weights, activation="silu"
    )


@peer("switchgear_packed", modes=("forward",))
def switchgear_packed(case: Case) -> Layer:
    """switchgear.moe on weights in panels, as after pack_weights."""
    from switchgear import moe, ops
    from switchgear.packing import to_panels

    panel = ops.panel(case.dtype)
    if not panel or case.shape.intermediate_size % panel or case.shape.hidden_size % panel:
        raise Skip(f"no panels of {case.dtype_name} at these sizes on {ops.cpu_isa()}")
    gate_up_proj, down_proj = (to_panels(weight.detach(), panel) for weight in (case.gate_up_proj, case.down_proj))
    return lambda inputs: moe(
        inputs.x, gate_up_proj, down_proj, inputs.topk_ids, inputs.topk_weights, activation="silu", panel=panel
    )
