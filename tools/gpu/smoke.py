# SPDX-License-Identifier: BSD-3-Clause
"""Every op, forward and backward, on a few small shapes that reach all kernels: for a first look, and for sanitizers.

    smoke.py [--device cuda] [--shapes 0,1,2,3] [--from N]
    smoke.py --profile TOKENS [--train]       one call of a layer with the shape of SonicMoE's 7B model, for a profiler

Results are compared with the reference. Prints lines.py's lines, so that a hang has a name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import switchgear
from switchgear import ops

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu.lines import parser_of, serve


class Shape(NamedTuple):
    tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int


# Multiples of 8 use TMA on sm_90; others use the kernels of sm_80.
SHAPES = (
    Shape(1, 128, 64, 8, 2),  # decoding
    Shape(24, 128, 64, 8, 2),  # few rows per expert
    Shape(300, 136, 72, 4, 2),  # tiles of 64 and 128 rows, with tails
    Shape(40, 50, 33, 5, 3),  # no vectors
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Roundings of h, a, y and of their gradients, half an ulp each, accumulated by sums.
TOLERANCE = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8, torch.float32: 2.0**-9}  # float32: perhaps with tf32


def layer(shape: Shape, dtype: torch.dtype, device: str, activation: str, backend: str) -> list[Tensor]:
    """Returns y and all gradients of a layer whose tensors are the same for every backend."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*size: int, scale: float = 1.0) -> Tensor:
        values = (torch.randn(size, generator=generator) * scale).to(dtype)
        return values.to(device).requires_grad_()

    x = leaf(shape.tokens, shape.hidden_size)
    gate_up = leaf(shape.num_experts, 2 * shape.intermediate_size, shape.hidden_size, scale=0.1)
    down = leaf(shape.num_experts, shape.hidden_size, shape.intermediate_size, scale=0.1)
    logits = torch.randn(shape.tokens, shape.num_experts, generator=generator).to(device).requires_grad_()
    grad_y = torch.randn(shape.tokens, shape.hidden_size, generator=generator).to(dtype).to(device)
    with switchgear.use_backend(backend):
        routing = switchgear.route(logits, shape.top_k, normalize=True)
        y = switchgear.moe(x, gate_up, down, routing.topk_ids, routing.topk_weights, activation=activation)
        torch.autograd.backward(y, grad_y)
    grads = [tensor.grad for tensor in (x, gate_up, down, logits)]
    return [y.detach(), *(grad for grad in grads if grad is not None)]


def stages(shape: Shape, dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    """The same layer, stage by stage."""
    generator = torch.Generator().manual_seed(1)

    def values(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator) * 0.3).to(dtype).to(device)

    x, weight = values(shape.tokens, shape.hidden_size), values(shape.num_experts, 40, shape.hidden_size)
    logits = torch.randn(shape.tokens, shape.num_experts, generator=generator).to(device)
    with switchgear.use_backend(backend), torch.no_grad():
        routing = switchgear.route(logits, shape.top_k, score_function="sigmoid")
        plan = switchgear.plan(routing.topk_ids, shape.num_experts)
        rows = switchgear.permute(x, plan)
        a = switchgear.glu(switchgear.grouped_gemm(rows, weight, plan.expert_offsets))
        return [rows, a, switchgear.combine(rows, plan, routing.topk_weights)]


def policies(shape: Shape, dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    """The choices of the routing policies' ops, for few distinct logits in two sequences."""
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(shape.tokens, shape.num_experts, generator=generator) * 3).round().to(dtype).to(device)
    sequence = (torch.arange(shape.tokens, device=device) % 2).int()
    limits = torch.full((2,), max(shape.tokens // 4, 1), dtype=torch.int32, device=device)
    with switchgear.use_backend(backend), torch.no_grad():
        some = switchgear.functional.route_dynamic(logits, top_p=0.6, max_experts=shape.top_k)
        scores = logits.float()
        kept = [
            ops.fit_capacity(
                some.topk_ids, some.topk_weights, scores, sequence, limits, shape.num_experts, drop, shape.num_experts
            )
            for drop in ("choice", "priority")
        ]
        taken = ops.column_topk(logits, sequence, limits)
        balanced = ops.assign_balanced(scores, sequence, 2, -1.0, 20)
        capped = ops.assign_capped(scores, sequence, limits, 2, 0.5, 5)
        return [some.topk_ids, some.topk_weights, taken, *kept, balanced, capped]


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest relative root-mean-square error."""

    def one(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b.double()).square().mean().sqrt() / (b.double().square().mean().sqrt() + 1e-30))

    return max(one(a, b) for a, b in zip(got, want, strict=True))


def compare(
    of: Callable[..., list[Tensor]], shape: Shape, dtype: torch.dtype, device: str, *options: str
) -> dict[str, Any]:
    """Runs `of` on the kernels and on the reference; raises if they differ."""
    got, want = (of(shape, dtype, device, *options, name) for name in ("native", "reference"))
    error = distance(got, want)
    if not error <= TOLERANCE[dtype]:
        raise AssertionError(f"relative error {error:.1e}, expected at most {TOLERANCE[dtype]:.1e}")
    return {"error": error}


def cases(shapes: list[Shape], device: str) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    found: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    for shape in shapes:
        for dtype in DTYPES:
            activation = "silu" if dtype is not torch.float16 else "gelu_tanh"
            end = f"{str(dtype).removeprefix('torch.')} {' '.join(map(str, shape))}"
            found += [
                (f"stages {end}", partial(compare, stages, shape, dtype, device)),
                (f"layer {end}", partial(compare, layer, shape, dtype, device, activation)),
                (f"policies {end}", partial(compare, policies, shape, dtype, device)),
            ]
    return found


def call_layer(tokens: int, train: bool) -> None:
    shape = Shape(tokens, 1536, 256, 128, 8)

    def leaf(*size: int) -> Tensor:
        return (torch.randn(size, device="cuda") * 0.02).bfloat16().requires_grad_(train)

    x = leaf(tokens, shape.hidden_size)
    gate_up = leaf(shape.num_experts, 2 * shape.intermediate_size, shape.hidden_size)
    down = leaf(shape.num_experts, shape.hidden_size, shape.intermediate_size)
    routing = switchgear.route(torch.randn(tokens, shape.num_experts, device="cuda"), shape.top_k)
    y = switchgear.moe(x, gate_up, down, routing.topk_ids, routing.topk_weights)
    if train:
        y.backward(torch.ones_like(y))
    torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", default="0,1,2,3", help="indices of SHAPES, separated by commas")
    parser.add_argument("--profile", type=int, metavar="TOKENS", help="call one layer, and stop")
    parser.add_argument("--train", action="store_true", help="of that layer: also its backward pass")
    args = parser.parse_args(arguments)
    if args.profile is not None:
        call_layer(args.profile, args.train)
        return 0
    return serve(cases([SHAPES[int(index)] for index in args.shapes.split(",")], args.device), args.first)


if __name__ == "__main__":
    sys.exit(main())
