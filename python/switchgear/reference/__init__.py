# SPDX-License-Identifier: BSD-3-Clause
"""Every op of switchgear in plain torch: the specification, and the backend "reference".

The signatures are those of the torch ops in ops/, with a Layer for the arguments of a whole layer; the formats are
those of include/switchgear/ops.h. Any floating dtype works on any device. Sums are in float32 (float64 for float64) and
are rounded once, at the end, to the dtype of the inputs. Gradients are explicit formulas, not autograd's, so that a
gradcheck in float64 verifies the formulas that the kernels implement.

routing.py    the router's product and the choice of experts; policies.py: the ops of routing policies
stages.py     plan, permute, combine; products.py: grouped_gemm; activations.py: the activation between the projections
layer.py      the whole layer: Layer, moe_forward, moe_accumulate, moe_backward; low-rank adapters of projections
formats.py    the tensors of a weight, by format: panels.py, compact.py, integers.py, minifloat.py, nf4.py, groups.py
checks.py     constraints of arguments

Letters: T tokens · K top_k · E experts · H hidden_size · I intermediate_size · S = T·K slots · N = 2I (gated) or I.
Errors: ValueError, or TypeError for a dtype, with the argument, what was expected and what was passed.
"""

from switchgear.reference.activations import ACTIVATIONS, activate, glu, glu_backward, halves
from switchgear.reference.checks import (
    check_choice,
    check_finite,
    check_fraction,
    check_num_experts,
    check_range,
    check_size,
    weight_dtype,
    wide,
)
from switchgear.reference.layer import GluOptions, Layer, keeps, moe_accumulate, moe_backward, moe_forward
from switchgear.reference.policies import (
    DROPS,
    assign_balanced,
    assign_capped,
    column_topk,
    fit_capacity,
    route_dynamic,
)
from switchgear.reference.products import empty_weight, grouped_gemm, grouped_gemm_wgrad
from switchgear.reference.routing import (
    GROUP_SCORES,
    NORMALIZE_EPSILON,
    SCORE_FUNCTIONS,
    exp,
    gate,
    gate_route,
    logits_dtype,
    route,
    route_backward,
    sanitize,
    scores,
)
from switchgear.reference.stages import (
    combine,
    combine_weight_backward,
    gather_rows,
    permute,
    plan,
    segments,
    to_slots,
)

__all__ = [
    "ACTIVATIONS",
    "DROPS",
    "GROUP_SCORES",
    "NORMALIZE_EPSILON",
    "SCORE_FUNCTIONS",
    "GluOptions",
    "Layer",
    "activate",
    "assign_balanced",
    "assign_capped",
    "check_choice",
    "check_finite",
    "check_fraction",
    "check_num_experts",
    "check_range",
    "check_size",
    "column_topk",
    "combine",
    "combine_weight_backward",
    "empty_weight",
    "exp",
    "fit_capacity",
    "gate",
    "gate_route",
    "gather_rows",
    "glu",
    "glu_backward",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "halves",
    "keeps",
    "logits_dtype",
    "moe_accumulate",
    "moe_backward",
    "moe_forward",
    "permute",
    "plan",
    "route",
    "route_backward",
    "route_dynamic",
    "sanitize",
    "scores",
    "segments",
    "to_slots",
    "weight_dtype",
    "wide",
]
