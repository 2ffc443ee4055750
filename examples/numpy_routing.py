# SPDX-License-Identifier: BSD-3-Clause
"""A whole layer on numpy arrays, stage by stage and in one call. The functions take arrays of any DLPack library.

python examples/numpy_routing.py
"""

from __future__ import annotations

import numpy as np

import switchgear

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 6, 16, 8, 4, 2


def main() -> float:
    """The largest difference between the two, relative to the largest element."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    x = normal(TOKENS, HIDDEN)
    gate_up_proj, down_proj = normal(EXPERTS, 2 * INTERMEDIATE, HIDDEN), normal(EXPERTS, HIDDEN, INTERMEDIATE)
    router_logits = normal(TOKENS, EXPERTS)
    router_logits[0] = np.nan  # routing is total: any logits give distinct experts, ties go to the lowest id

    routing = switchgear.route(router_logits, TOP_K, normalize=True)
    plan = switchgear.plan(routing.topk_ids, EXPERTS)
    print("topk_ids      ", routing.topk_ids.tolist())
    print("expert_offsets", plan.expert_offsets.tolist(), "(expert e owns slots [offsets[e], offsets[e + 1]))")
    print("token_indices ", plan.token_indices.tolist(), "(slot -> token)")

    h = switchgear.grouped_gemm(x, gate_up_proj, plan.expert_offsets, token_indices=plan.token_indices)
    a = switchgear.glu(h, "silu")
    permuted_y = switchgear.grouped_gemm(a, down_proj, plan.expert_offsets)
    y = switchgear.combine(permuted_y, plan, routing.topk_weights)

    in_one_call = switchgear.moe(x, gate_up_proj, down_proj, routing.topk_ids, routing.topk_weights)
    error = float(np.abs(y - in_one_call).max() / np.abs(y).max())
    print(f"{type(y).__name__} {y.shape} {y.dtype}; stages and moe differ by {error:.1e} of the largest element")
    return error


if __name__ == "__main__":
    main()
