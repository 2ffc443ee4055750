# SPDX-License-Identifier: BSD-3-Clause
"""The functions of switchgear, differentiable.

    router_logits [T,E] ──route──► topk_ids, topk_weights [T,K]            T tokens, K choices, E experts
                                      │
                                      └──plan──► Plan{expert_offsets [E+1], token_indices [S], slot_indices [T,K]}
                                                                                                      S = T·K slots
    x [T,H] ──permute──► permuted_x [S,H] ──grouped_gemm──► h [S,N] ──glu──► a [S,I] ──grouped_gemm──► permuted_y [S,H]
                                                                     permuted_y ──combine──► y [T,H]

`gate` computes router_logits from x and the router's weight. `moe` computes everything after route with one op forward
and one backward. It saves x and h for backward, and no other tensor of that size. The stages can also be called
separately. `moe_accumulate` is the forward of a layer whose experts come into memory one after the other.

Arguments are torch tensors or arrays of other libraries (see arrays.py). A projection can also be a Weight in another
format (weights/). Derivatives are beside the functions.
"""

from switchgear.backends import cast_in_autocast as in_autocast_dtype
from switchgear.functional.arguments import as_ids, as_limit, as_number, as_weights
from switchgear.functional.attention import attend, rms_norm, rotate_heads
from switchgear.functional.layer import moe, moe_accumulate
from switchgear.functional.products import AnyWeight, grouped_gemm, linear
from switchgear.functional.routes import Plan, Routing, gate, gate_route, plan, route, route_dynamic
from switchgear.functional.rows import combine, glu, permute

__all__ = [
    "AnyWeight",
    "Plan",
    "Routing",
    "as_ids",
    "as_limit",
    "as_number",
    "as_weights",
    "attend",
    "combine",
    "gate",
    "gate_route",
    "glu",
    "grouped_gemm",
    "in_autocast_dtype",
    "linear",
    "moe",
    "moe_accumulate",
    "permute",
    "plan",
    "rms_norm",
    "rotate_heads",
    "route",
    "route_dynamic",
]
