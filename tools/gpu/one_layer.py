# SPDX-License-Identifier: BSD-3-Clause
"""One call of a layer, for a profiler: one_layer.py [--tokens N] [--train]. The shape is SonicMoE's 7B model."""

from __future__ import annotations

import argparse

import torch

import switchgear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--train", action="store_true")
    args = parser.parse_args()
    hidden, width, experts, top_k = 1536, 256, 128, 8

    def leaf(*size: int) -> torch.Tensor:
        return (torch.randn(size, device="cuda") * 0.02).bfloat16().requires_grad_(args.train)

    x, gate_up, down = leaf(args.tokens, hidden), leaf(experts, 2 * width, hidden), leaf(experts, hidden, width)
    routing = switchgear.route(torch.randn(args.tokens, experts, device="cuda"), top_k)
    y = switchgear.moe(x, gate_up, down, routing.topk_ids, routing.topk_weights)
    if args.train:
        y.backward(torch.ones_like(y))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
