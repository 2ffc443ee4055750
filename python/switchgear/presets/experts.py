# SPDX-License-Identifier: BSD-3-Clause
"""Papers about what an expert is, beside how it is chosen."""

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
    """Null experts that cost nothing beside the real ones: a token has as many real experts as it needs.

    Paper: AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language Models, arXiv:2406.13233
    Example: MoE(64, 32, 8, **presets.adamoe())(x)

    Weights are normalised over the real experts of a token. 16 null experts and the coefficient are those of the
    published Mixtral configuration; top_k is unverified.
    """
    return {
        "select": TopK(top_k),
        "balance": [partial(NullAwareSwitchLoss, balance, num_null=null_experts)],
        "null_experts": null_experts,
    }


def hmoe(*, widths: str = "arithmetic", top_k: int = 2, penalty: float = 1e-2, entropy: float = 1e-2) -> dict[str, Any]:
    """Eight experts of different widths, and a loss that makes wide ones earn their cost.

    Paper: HMoE: Heterogeneous Mixture of Experts for Language Modeling, arXiv:2408.10681
    Example: MoE(64, 32, 8, **presets.hmoe())(x)

    widths: "arithmetic" 9, 11 … 23, "geometric" 1, 2 … 128, or "hybrid" 1, 1, 1, 1, 2, 2, 4, 4; intermediate_size is
    their mean. penalty: the coefficient for widths whose mean is 1. The coefficient of the entropy loss is unverified.
    With select=TopP(0.6) instead it is the paper's other variant.
    """
    check_choice("widths", widths, tuple(WIDTHS))
    ratios = WIDTHS[widths]
    losses = [partial(ParamPenalty, ratios, penalty * 8 / sum(ratios)), EntropyLoss(entropy)]
    return {"select": TopK(top_k), "balance": losses, "widths": ratios}


def word_experts(*, vocabulary_size: int, top_k: int = 1) -> dict[str, Any]:
    """A fixed random table says which experts a vocabulary id has; there is no router to train.

    Paper: Memory Augmented Language Models through Mixture of Word Experts, arXiv:2311.10768
    Example: MoE(64, 8, 256, **presets.word_experts(vocabulary_size=100))(x, token_ids=token_ids)

    Tens of thousands of small experts there, over a routing vocabulary of up to a million ids, the frequent ones with
    experts of their own: give such a table with select=partial(Lookup, table).
    """
    return {"select": partial(Lookup.hashed, vocabulary_size, top_k=top_k)}


def moe_x(*, top_k: int = 2, scale: float = 1.0) -> dict[str, Any]:
    """Wide ReLU experts, chosen by how sparse their activations will be, as their weights predict it.

    Paper: Mixture of Experts Made Intrinsically Interpretable, arXiv:2503.07639
    Example: MoE(64, 32, 8, **presets.moe_x())(x)

    The sign and the normalisation of the score, scale and top_k are unverified.
    """
    return {
        "score": partial(SparsityAware, scale=scale),
        "select": TopK(top_k),
        "activation": "relu",
        "gated": False,
    }
