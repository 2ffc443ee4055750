# SPDX-License-Identifier: BSD-3-Clause
"""Papers on what an expert is, rather than how it is chosen; and on blocks that skip tokens."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from switchgear.checks import checked
from switchgear.papers.parts.controllers import CapacityByKind
from switchgear.papers.parts.losses import ChoiceLoss, EntropyLoss, NullAwareSwitchLoss, ParamPenalty
from switchgear.papers.parts.masks import Lookup
from switchgear.papers.parts.scores import GatingResidual, SparsityAware
from switchgear.papers.parts.selections import DepthChoice
from switchgear.presets.entry import CODE, OURS, PAPER, Example, preset
from switchgear.routing import Capacity, TopK, TopP

WIDTHS = {
    "arithmetic": [9, 11, 13, 15, 17, 19, 21, 23],
    "geometric": [1, 2, 4, 8, 16, 32, 64, 128],
    "hybrid": [1, 1, 1, 1, 2, 2, 4, 4],
}


@preset(
    "structure",
    8,
    "AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language Models, arXiv:2406.13233",
    f"{PAPER}; constants: {CODE}, which averages the null experts' load along another axis",
)
def adamoe(*, top_k: int = 4, null_experts: int = 16, balance: float = 1e-4) -> dict[str, Any]:
    """Null experts without cost, so each token uses as many real experts as it needs.

    Weights are normalised over the real experts of a token. The constants are those of the published code for Mixtral,
    which starts the router's row of null expert j as a copy of that of expert j mod E.
    """
    return {
        "select": TopK(top_k),
        "balance": [partial(NullAwareSwitchLoss, balance, num_null=null_experts)],
        "null_experts": null_experts,
    }


@preset(
    "structure",
    9,
    "HMoE: Heterogeneous Mixture of Experts for Language Modeling, arXiv:2408.10681",
    f"{PAPER}; widths relative to their mean in the penalty, and the entropy per token: {OURS}",
)
@checked
def hmoe(
    *,
    widths: Literal["arithmetic", "geometric", "hybrid"] = "arithmetic",
    top_k: int = 2,
    penalty: float = 0.1,
    top_p: float | None = None,
    entropy: float | None = None,
) -> dict[str, Any]:
    """Eight experts of different widths, and a loss that penalises wide experts by their cost.

    The weights of the chosen experts sum to 1. widths: "arithmetic" 9, 11 … 23, "geometric" 1, 2 … 128, or "hybrid" 1,
    1, 1, 1, 2, 2, 4, 4; intermediate_size is their mean. penalty: the coefficient of the penalty, in which the paper's
    h_ffn is the width relative to the mean, so that equal widths give the usual balance loss. top_p: chooses by
    TopP(top_p) instead of the top_k best, with an entropy loss; the paper's other variant has 0.6. entropy: the
    coefficient of that loss before the factor E of equation 5; if None, the paper's 0.03. The loss lowers the entropy
    of each token; the sign that equation 5 prints would raise it.
    """
    if top_p is None and entropy is not None:
        raise ValueError(f"top_p: expected a number with entropy={entropy}, got None")
    ratios = WIDTHS[widths]
    losses: list[Any] = [partial(ParamPenalty, ratios, penalty * len(ratios) / sum(ratios))]
    if top_p is None:
        return {"select": TopK(top_k, normalize=True), "balance": losses, "widths": ratios}
    losses.append(EntropyLoss((0.03 if entropy is None else entropy) * len(ratios)))
    return {"select": TopP(top_p, normalize=True), "balance": losses, "widths": ratios}


@preset(
    "structure",
    17,
    "Memory Augmented Language Models through Mixture of Word Experts, arXiv:2311.10768",
    f"{PAPER}; the table is random, the paper's follows frequencies",
    example=Example((64, 8, 256), arguments={"vocabulary_size": 100}, inputs={"token_ids": "token_ids"}),
)
def word_experts(*, vocabulary_size: int, top_k: int = 1) -> dict[str, Any]:
    """A fixed random table maps each vocabulary id to its experts; there is no router to train.

    The paper uses tens of thousands of small experts and a routing vocabulary of up to a million ids; frequent ids have
    their own experts. Pass such a table as select=partial(Lookup, table).
    """
    return {"select": partial(Lookup.hashed, vocabulary_size, top_k=top_k)}


@preset(
    "score",
    22,
    "Mixture of Experts Made Intrinsically Interpretable, arXiv:2503.07639",
    f"{PAPER}; sign and normalisation of the score: {OURS}",
    unverified="scale, top_k",
)
def moe_x(*, top_k: int = 2, scale: float = 1.0) -> dict[str, Any]:
    """Wide ReLU experts, chosen by the activation sparsity that their weights predict."""
    return {
        "score": partial(SparsityAware, scale=scale),
        "select": TopK(top_k),
        "activation": "relu",
        "gated": False,
    }


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
