# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives: the autograd.Functions around the ops, used only if a gradient or a forward-mode tangent is needed.

Ops have no autograd formula; callers such as functional/ apply these functions. Gradients can be taken once, those of
gate any number of times; forward mode raises. A stored Weight has no gradient: gradients reach activations, biases and
topk_weights.
"""

from switchgear.autograd.common import apply, is_transposed, needs_autograd, once
from switchgear.autograd.in_place import accumulate_into_grad
from switchgear.autograd.layer import Moe, inputs_of
from switchgear.autograd.products import GroupedGemm, gemm_inputs_of
from switchgear.autograd.routes import Gate, Route, RouteDynamic
from switchgear.autograd.rows import Combine, Glu, Permute

__all__ = [
    "Combine",
    "Gate",
    "Glu",
    "GroupedGemm",
    "Moe",
    "Permute",
    "Route",
    "RouteDynamic",
    "accumulate_into_grad",
    "apply",
    "gemm_inputs_of",
    "inputs_of",
    "is_transposed",
    "needs_autograd",
    "once",
]
