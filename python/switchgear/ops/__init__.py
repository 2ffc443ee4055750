# SPDX-License-Identifier: BSD-3-Clause
"""The torch ops of switchgear: schema, fake implementation, and the call of the native module or of the reference.

Only this package calls the ops of `_C` and `_cuda`. It is private: ops have no autograd formula, so use the public
functions of functional/. Shapes and formats are those of include/switchgear/ops.h.

An op is a schema, a function that allocates its outputs, and one that says what the native module gets. It runs on `_C`
for tensors on the CPU, on `_cuda` for those on a CUDA device.

native.py        the native modules
registration.py  how an op is defined
routing.py       the choice of experts: gate, route and the ops of routing policies
stages.py        the stages of a layer: plan, permute, grouped_gemm, glu, combine
layer.py         the whole layer in one op: moe_forward, moe_accumulate, moe_backward
"""

from switchgear.ops.layer import (
    GRADIENTS,
    differentiable,
    layer_accumulate,
    layer_backward,
    layer_forward,
    moe_accumulate,
    moe_backward,
    moe_backward_on_host,
    moe_forward,
    moe_forward_on_host,
    needs_no_dispatch,
    plain_layer_on_host,
)
from switchgear.ops.native import (
    Kernels,
    advise_huge_pages,
    available_cpu_isas,
    check_capsule,
    collapse_into_huge_pages,
    cpu_isa,
    expand_compact,
    host,
    interleave_pages,
    pack_compact,
    panel_layout,
    set_cpu_isa,
    version,
)
from switchgear.ops.routing import (
    assign_balanced,
    assign_capped,
    column_topk,
    fit_capacity,
    gate,
    gate_route,
    gate_route_on_host,
    route,
    route_backward,
    route_dynamic,
)
from switchgear.ops.stages import (
    combine,
    combine_weight_backward,
    glu,
    glu_backward,
    grouped_gemm,
    grouped_gemm_wgrad,
    permute,
    plan,
)
from switchgear.reference.layer import GluOptions, Layer

__all__ = [
    "GRADIENTS",
    "GluOptions",
    "Kernels",
    "Layer",
    "advise_huge_pages",
    "assign_balanced",
    "assign_capped",
    "available_cpu_isas",
    "check_capsule",
    "collapse_into_huge_pages",
    "column_topk",
    "combine",
    "combine_weight_backward",
    "cpu_isa",
    "differentiable",
    "expand_compact",
    "fit_capacity",
    "gate",
    "gate_route",
    "gate_route_on_host",
    "glu",
    "glu_backward",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "host",
    "interleave_pages",
    "layer_accumulate",
    "layer_backward",
    "layer_forward",
    "moe_accumulate",
    "moe_backward",
    "moe_backward_on_host",
    "moe_forward",
    "moe_forward_on_host",
    "needs_no_dispatch",
    "pack_compact",
    "panel_layout",
    "permute",
    "plain_layer_on_host",
    "plan",
    "route",
    "route_backward",
    "route_dynamic",
    "set_cpu_isa",
    "version",
]
