# SPDX-License-Identifier: BSD-3-Clause
"""Newer structures: the router as a ReLU, blocks that skip tokens, experts without matrix products, weights inside."""

from __future__ import annotations

from functools import partial
from typing import Any

from switchgear.papers.parts.controllers import AdaptiveSparsity
from switchgear.papers.parts.limits import CapacityByKind
from switchgear.papers.parts.losses import ChoiceLoss, ParamPenalty
from switchgear.papers.parts.scores import GatingResidual
from switchgear.papers.parts.selections import DepthChoice, Positive
from switchgear.presets.entry import OURS, PAPER, Example, preset
from switchgear.routing import Capacity, TopK


@preset(
    "selection",
    None,
    "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing, arXiv:2412.14711",
    f"{PAPER}; a coefficient for each layer instead of one for all: {OURS}",
)
def remoe(*, top_k: float = 2, initial: float = 1e-8, rate: float = 1.2) -> dict[str, Any]:
    """The experts with positive logits, weighted by them; the coefficient of an L1 loss follows the sparsity.

    top_k: the average number of experts per token that the loss aims at. switchgear.after_step(model) updates λ.
    """
    return {"select": Positive(), "balance": [partial(AdaptiveSparsity, top_k, initial=initial, rate=rate)]}


@preset(
    "structure",
    None,
    "Mixture-of-Depths: Dynamically allocating compute in transformer-based language models, arXiv:2404.02258",
    f"{PAPER}, for a feed-forward block",
    unverified="balance",
    example=Example((64, 32, 1), arguments={"fraction": 0.5}),
)
def mixture_of_depths(*, fraction: float = 0.125, causal: bool = True, balance: float = 1e-2) -> dict[str, Any]:
    """A block that processes a fraction of the tokens of each sequence, weighted by their logits; the others skip it.

    fraction: an eighth in the paper. The residual around the layer passes skipped tokens on. With more experts each
    takes fraction / E of the tokens. causal: in evaluation, the tokens with a positive logit; an auxiliary loss trains
    the logits for that.
    """
    losses = [ChoiceLoss(balance)] if causal else []
    return {"select": DepthChoice(fraction, causal), "balance": losses}


@preset(
    "model",
    None,
    "The Llama 4 herd, https://ai.meta.com/blog/llama-4-multimodal-intelligence",
    "formula of the code in Hugging Face transformers",
    example=Example((64, 32, 16)),
)
def llama4(*, top_k: int = 1) -> dict[str, Any]:
    """The best expert of the input multiplied by the sigmoid of its logit, and a shared expert."""
    return {"select": TopK(top_k, "sigmoid"), "scale_input": True, "num_shared_experts": 1}


def _zero_computation_penalty(num_experts: int, tau: float, coefficient: float, free: int) -> ParamPenalty:
    return ParamPenalty([1.0] * (num_experts - free) + [tau] * free, coefficient)


@preset(
    "structure",
    None,
    "MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts, arXiv:2410.07348",
    f"{PAPER}; initial values, no capacity by default: {OURS}; "
    "its code weighs null experts, scales x and routes otherwise",
    unverified="tau, balance, capacity_factor",
)
def moe_plus_plus(
    *,
    top_k: int = 2,
    null: int = 1,
    copy: int = 1,
    constant: int = 2,
    tau: float = 0.75,
    balance: float = 1e-2,
    capacity_factor: float | None = None,
) -> dict[str, Any]:
    """Experts that return nothing, x, or a mix of x and a learned vector, beside real ones; the logits of the layer
    before enter the router.

    The loss weighs these experts by tau. With a capacity_factor (the paper's is 1.1) they accept 1 / tau
    times as many tokens as real experts; without it nothing is dropped. Pass the logits on:
    y, routing = moe(x, fields={"previous_logits": z}), then z = routing.router_logits for the next layer. W_c and the
    residual start at zero (a choice of ours).

    The published code differs from the paper: the weight of the null expert is set to zero before the two
    weights are divided by their sum, all experts get 2·x, the router has two layers with a tanh between them, and
    virtual experts come in the order constant, copy, null.
    """
    free = null + copy + constant
    penalty = partial(_zero_computation_penalty, tau=tau, coefficient=balance, free=free)
    limits: dict[str, Any] = {}
    if capacity_factor is not None:
        limits["capacity"] = CapacityByKind(free, tau, Capacity(capacity_factor))
    return {
        **limits,
        "score": GatingResidual,
        "select": TopK(top_k),
        "balance": [penalty],
        "null_experts": null,
        "copy_experts": copy,
        "constant_experts": constant,
        "renormalize": False,
        "mix_constants": constant > 0,
        "return_routing": True,
    }
