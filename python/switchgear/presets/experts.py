# SPDX-License-Identifier: BSD-3-Clause
"""Papers on what an expert is, rather than how it is chosen."""

from __future__ import annotations

from functools import partial
from typing import Any

from switchgear.reference import check_choice
from switchgear.routing import EntropyLoss, Lookup, NullAwareSwitchLoss, ParamPenalty, SparsityAware, TopK

WIDTHS = {
    "arithmetic": [9, 11, 13, 15, 17, 19, 21, 23],
    "geometric": [1, 2, 4, 8, 16, 32, 64, 128],
    "hybrid": [1, 1, 1, 1, 2, 2, 4, 4],
}


def adamoe(*, top_k: int = 4, null_experts: int = 16, balance: float = 1e-4) -> dict[str, Any]:
    """Null experts without cost, so each token uses as many real experts as it needs.

    Paper: AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language Models, arXiv:2406.13233
    Example: MoE(64, 32, 8, **presets.adamoe())(x)

    Weights are normalised over the real experts of a token. 16 null experts and the coefficient are from the published
    Mixtral configuration; top_k is unverified.
    """
    return {
        "select": TopK(top_k),
        "balance": [partial(NullAwareSwitchLoss, balance, num_null=null_experts)],
        "null_experts": null_experts,
    }


def hmoe(*, widths: str = "arithmetic", top_k: int = 2, penalty: float = 1e-2, entropy: float = 1e-2) -> dict[str, Any]:
    """Eight experts of different widths, and a loss that penalises wide experts by their cost.

    Paper: HMoE: Heterogeneous Mixture of Experts for Language Modeling, arXiv:2408.10681
    Example: MoE(64, 32, 8, **presets.hmoe())(x)

    widths: "arithmetic" 9, 11 … 23, "geometric" 1, 2 … 128, or "hybrid" 1, 1, 1, 1, 2, 2, 4, 4; intermediate_size is
    their mean. penalty: the coefficient for widths of mean 1. The coefficient of the entropy loss is unverified.
    select=TopP(0.6) gives the paper's other variant.
    """
    check_choice("widths", widths, tuple(WIDTHS))
    ratios = WIDTHS[widths]
    losses = [partial(ParamPenalty, ratios, penalty * 8 / sum(ratios)), EntropyLoss(entropy)]
    return {"select": TopK(top_k), "balance": losses, "widths": ratios}


def word_experts(*, vocabulary_size: int, top_k: int = 1) -> dict[str, Any]:
    """A fixed random table maps each vocabulary id to its experts; there is no router to train.

    Paper: Memory Augmented Language Models through Mixture of Word Experts, arXiv:2311.10768
    Example: MoE(64, 8, 256, **presets.word_experts(vocabulary_size=100))(x, token_ids=token_ids)

    The paper uses tens of thousands of small experts and a routing vocabulary of up to a million ids; frequent ids have
    their own experts. Pass such a table as select=partial(Lookup, table).
    """
    return {"select": partial(Lookup.hashed, vocabulary_size, top_k=top_k)}


def moe_x(*, top_k: int = 2, scale: float = 1.0) -> dict[str, Any]:
    """Wide ReLU experts, chosen by the activation sparsity that their weights predict.

    Paper: Mixture of Experts Made Intrinsically Interpretable, arXiv:2503.07639
    Example: MoE(64, 32, 8, **presets.moe_x())(x)

    The sign and normalisation of the score, scale, and top_k are unverified.
    """
    return {
        "score": partial(SparsityAware, scale=scale),
        "select": TopK(top_k),
        "activation": "relu",
        "gated": False,
    }
