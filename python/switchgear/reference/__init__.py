# SPDX-License-Identifier: BSD-3-Clause
"""Every op of switchgear in plain torch: the specification, and the backend "reference".

The signatures are those of the torch ops in ops/, with a Layer for the arguments of a whole layer; the formats are
those of include/switchgear/ops.h. Any floating dtype works on any device. Sums are in float32 (float64 for float64) and
are rounded once, at the end, to the dtype of the inputs. Gradients are explicit formulas, not autograd's, so that a
gradcheck in float64 verifies the formulas that the kernels implement.

routing.py    the router's product and the choice of experts; policies.py: the ops of routing policies
stages.py     plan, permute, combine; products.py: grouped_gemm; activations.py: the activation between the projections
attention.py  attention over a cache
layer.py      the whole layer: Layer, moe_forward, moe_accumulate, moe_backward; low-rank adapters of projections
formats.py    the tensors of a weight, by format: panels.py, compact.py, integers.py, minifloat.py, nf4.py,
              groups.py, gguf.py
checks.py     constraints of arguments

Letters: T tokens · K top_k · E experts · H hidden_size · I intermediate_size · S = T·K slots · N = 2I (gated) or I.
Errors: ValueError, or TypeError for a dtype, with the argument, what was expected and what was passed.
"""

from switchgear.reference import activations, attention, checks, layer, policies, products, routing, stages
from switchgear.reference.activations import *  # noqa: F403
from switchgear.reference.attention import *  # noqa: F403
from switchgear.reference.checks import *  # noqa: F403
from switchgear.reference.layer import *  # noqa: F403
from switchgear.reference.policies import *  # noqa: F403
from switchgear.reference.products import *  # noqa: F403
from switchgear.reference.routing import *  # noqa: F403
from switchgear.reference.stages import *  # noqa: F403

__all__ = [
    *activations.__all__,
    *attention.__all__,
    *checks.__all__,
    *layer.__all__,
    *policies.__all__,
    *products.__all__,
    *routing.__all__,
    *stages.__all__,
]
