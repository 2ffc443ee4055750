# SPDX-License-Identifier: BSD-3-Clause
"""One case of the benchmark: weights, inputs, and the correct result, computed in float64.

y_t = Σ_k w_tk · down_e · (silu(gate_e x_t) ⊙ up_e x_t),  e = topk_ids[t,k]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from switchgear.weights import Weight, advise_huge_pages, use_huge_pages

from .minifloats import decoded
from .shapes import Shape, forward_flops, train_flops


class Format(NamedTuple):
    """How the weights of a case are stored."""

    dtype: torch.dtype  # of x, y, and of the weights before they are quantised
    weight_bytes: float  # bytes of an element; includes its share of the scales if the format fixes them
    arithmetic: str | int  # the fastest multiply-adds for it: a dtype, or the bits of weights beside int8
    modes: tuple[str, ...]


FORMATS = {
    "bf16": Format(torch.bfloat16, 2.0, "bfloat16", ("forward", "train")),
    "fp32": Format(torch.float32, 4.0, "float32", ("forward", "train")),
    "int8": Format(torch.bfloat16, 1.0, 8, ("forward",)),
    "int4": Format(torch.bfloat16, 0.5, 4, ("forward",)),
    "fp8": Format(torch.bfloat16, 1.0 + 4 / 128**2, "bfloat16", ("forward",)),
    "mxfp4": Format(torch.bfloat16, 17 / 32, "bfloat16", ("forward",)),
    **{f"groups{b}": Format(torch.bfloat16, b / 8 + 2 / 128, "bfloat16", ("forward",)) for b in (4, 3, 2, 1)},
}
DECODE_TOKENS = 16  # up to here weights dominate; they must come from memory, as in a model of many layers
ROUTINGS = 4  # used in turn, so that the experts of a call are not in the cache


class Inputs(NamedTuple):
    x: Tensor  # [T,H]
    topk_ids: Tensor  # [T,K] int32
    topk_ids_int64: Tensor  # the same: torch's indexing needs int64, and the conversion is not timed
    topk_weights: Tensor  # [T,K] float32, representable in the case's dtype
    topk_weights_low: Tensor  # the same in the case's dtype, as about half of Hugging Face's models pass them


class Case(NamedTuple):
    shape_name: str
    shape: Shape
    dtype_name: str
    tokens: int
    mode: str  # "forward" or "train"
    gate_up_proj: torch.nn.Parameter  # [E,2I,H], gate rows first; for fp8, mxfp4 and groups the decoded weights
    down_proj: torch.nn.Parameter  # [E,H,I]
    inputs: list[Inputs]
    grad_y: Tensor  # [T,H]
    pages: str = "huge"  # or "default"
    stored: tuple[Weight, Weight] | None = None  # both projections in fp8, mxfp4 or groups

    @property
    def format(self) -> Format:
        return FORMATS[self.dtype_name]

    @property
    def dtype(self) -> torch.dtype:
        return self.format.dtype

    @property
    def weights(self) -> list[Tensor]:
        """gate_up_proj and down_proj, for competitors that pack or quantise them."""
        return [self.gate_up_proj.detach(), self.down_proj.detach()]

    def matrices(self, expert: int) -> tuple[Tensor, Tensor]:
        """Both matrices of an expert in float64, exactly as the format represents them."""
        if self.stored is not None:
            gate_up, down = (decoded(weight, expert) for weight in self.stored)
        else:
            gate_up, down = (weight[expert] for weight in self.weights)
        return gate_up.double(), down.double()

    def on_its_pages(self, weight: Tensor) -> Tensor:
        """Moves a competitor's own copy of the weights onto the kind of pages that all weights of this case use."""
        if self.pages == "huge":
            use_huge_pages([weight])
        return weight

    @property
    def name(self) -> str:
        return f"{self.shape_name}, T={self.tokens}, {self.dtype_name}, {self.mode}"

    @property
    def flops(self) -> int:
        return flops_of(self.shape, self.tokens, self.mode)

    @property
    def touched(self) -> list[list[int]]:
        """The experts with at least one token, for each routing."""
        return [torch.unique(inputs.topk_ids).tolist() for inputs in self.inputs]

    @property
    def touched_experts(self) -> float:
        """The mean of their number over the routings."""
        return sum(map(len, self.touched)) / len(self.inputs)

    @property
    def weight_bytes(self) -> float:
        return moved_bytes(self.shape, self.touched_experts, self.dtype_name, self.mode)


def flops_of(shape: Shape, tokens: int, mode: str) -> int:
    return (forward_flops if mode == "forward" else train_flops)(shape, tokens)


def moved_bytes(shape: Shape, touched_experts: float, dtype_name: str, mode: str) -> float:
    """Bytes of expert weights that a call must move: read once; in training read twice, and their gradient written."""
    one = 3 * shape.hidden_size * shape.intermediate_size * FORMATS[dtype_name].weight_bytes
    return touched_experts * one * (1 if mode == "forward" else 3)


def make_weights(
    shape: Shape, dtype: torch.dtype, huge_pages: bool = True
) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """gate_up_proj and down_proj, Gaussian with standard deviation 0.02.

    Random numbers are slow to make, and experts only need different memory. So each expert is a window of one random
    pool, at an odd offset, and no two experts are equal. Weights are on huge pages, for all competitors alike; if
    `huge_pages` is false, they stay where torch allocates them.
    """
    size = 3 * shape.hidden_size * shape.intermediate_size
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(size + 2 * 1021 * shape.num_experts, generator=generator) * 0.02).to(dtype)
    gate_up = torch.empty(shape.num_experts, 2 * shape.intermediate_size, shape.hidden_size, dtype=dtype)
    down = torch.empty(shape.num_experts, shape.hidden_size, shape.intermediate_size, dtype=dtype)
    if huge_pages:
        advise_huge_pages(gate_up)
        advise_huge_pages(down)
    for expert in range(shape.num_experts):
        window = pool[2 * 1021 * expert + 1 :][:size] if expert else pool[:size]
        gate_up[expert] = window[: gate_up[0].numel()].view_as(gate_up[0])
        down[expert] = window[gate_up[0].numel() :].view_as(down[0])
    return torch.nn.Parameter(gate_up), torch.nn.Parameter(down)


def make_inputs(shape: Shape, dtype: torch.dtype, tokens: int, routing: str, seed: int) -> Inputs:
    """Random tokens and a routing: "balanced", or "zipf", where expert e is 1/(e+1) times as likely as expert 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, shape.hidden_size, generator=generator).to(dtype)
    popularity = 1.0 / torch.arange(1, shape.num_experts + 1) if routing == "zipf" else torch.ones(shape.num_experts)
    # top-k of log p + Gumbel noise draws k experts without replacement, with probabilities p
    noise = -torch.empty(tokens, shape.num_experts).exponential_(generator=generator).log()
    topk_ids = (popularity.log() + noise).topk(shape.top_k, -1).indices
    weights = torch.randn(tokens, shape.top_k, generator=generator).softmax(-1).to(dtype)
    return Inputs(x, topk_ids.int(), topk_ids, weights.float(), weights)


def make_case(
    shape_name: str, shape: Shape, dtype_name: str, tokens: int, mode: str, routing: str,
    weights: tuple[torch.nn.Parameter, torch.nn.Parameter], pages: str = "huge",
    stored: tuple[Weight, Weight] | None = None,
) -> Case:  # fmt: skip
    dtype = FORMATS[dtype_name].dtype
    count = ROUTINGS if tokens <= DECODE_TOKENS else 1
    inputs = [make_inputs(shape, dtype, tokens, routing, seed) for seed in range(count)]
    grad_y = torch.randn(tokens, shape.hidden_size, generator=torch.Generator().manual_seed(99)).to(dtype)
    return Case(shape_name, shape, dtype_name, tokens, mode, *weights, inputs, grad_y, pages, stored)


Layer = Callable[[Inputs], Tensor]


class Gradients(NamedTuple):
    x: Tensor
    topk_weights: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor


def forward(layer: Layer, inputs: Inputs) -> Tensor:
    with torch.inference_mode():
        return layer(inputs)


def train(layer: Layer, case: Case, inputs: Inputs) -> Gradients:
    """One step as in a training loop: gradients dropped (zero_grad's default), forward, backward."""
    case.gate_up_proj.grad = case.down_proj.grad = None
    x = inputs.x.detach().requires_grad_()
    weights = inputs.topk_weights.detach().requires_grad_()
    low = inputs.topk_weights_low.detach().requires_grad_()
    y = layer(inputs._replace(x=x, topk_weights=weights, topk_weights_low=low))
    torch.autograd.backward(y, case.grad_y)
    grads = (x.grad, weights.grad if low.grad is None else low.grad, case.gate_up_proj.grad, case.down_proj.grad)
    if any(grad is None for grad in grads):
        raise RuntimeError("a gradient is missing")
    return Gradients(*grads)  # type: ignore[arg-type]


def call_of(case: Case, layer: Layer) -> Callable[[int], object]:
    """One timed call; its number selects the routing."""
    if case.mode == "train":
        return lambda number: train(layer, case, case.inputs[number % len(case.inputs)])
    return lambda number: forward(layer, case.inputs[number % len(case.inputs)])
