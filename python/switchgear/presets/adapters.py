# SPDX-License-Identifier: BSD-3-Clause
"""Mixtures of low-rank adapters beside frozen layers: options of adapters.LoRAExperts, add_lora_experts and mixture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.adapters import LoRAExperts
from switchgear.papers.parts.losses import LocalizedBalance
from switchgear.papers.parts.scores import ClusterPrior, FromEmbedding, PerSequence, PosthocGate
from switchgear.presets.entry import CODE, OURS, PAPER, Example, preset
from switchgear.routing import Dense, Linear, Sum, TopK

Options = dict[str, Any]


def adapted_linear(
    hidden_size: int, intermediate_size: int, num_experts: int, *, rank: int | Sequence[int], **options: Any
) -> LoRAExperts:
    """LoRAExperts of a new Linear with hidden_size inputs and intermediate_size outputs."""
    place = {name: options[name] for name in ("device", "dtype") if name in options}
    linear = nn.Linear(hidden_size, intermediate_size, **place)
    return LoRAExperts(linear, num_experts, rank, **options)


@preset(
    "adapter",
    64,
    "LoRAMoE: Revolutionizing Mixture of Experts for Maintaining World Knowledge in Language Model "
    "Alignment, arXiv:2312.09979",
    f"{PAPER}; its code has a dropout mask for each expert, and the unbiased variance over mean² as the loss",
    unverified="delta, balance",
    example=Example((64, 64, 8), arguments={"expert_types": [0, 0, 0, 0, 1, 1, 1, 1]}, inputs={"embedding": "kinds"}),
)
def loramoe(
    *,
    expert_types: Sequence[int] | Tensor | None = None,
    rank: int = 4,
    alpha: float = 32,
    dropout: float = 0.05,
    delta: float = 0.1,
    balance: float = 0.1,
) -> Options:
    """All adapters, weighted by a softmax; a loss balances each type of sequence over the experts of its type.

    expert_types [E]: the type of each expert; Context.embedding [B] is that of each sequence. Without it there is no
    loss, as in the authors' scripts.
    """
    losses = [] if expert_types is None else [partial(LocalizedBalance, expert_types, delta, balance)]
    return {
        "layer": adapted_linear,
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "select": Dense(),
        "balance": losses,
    }


@preset(
    "adapter",
    65,
    "Octavius: Mitigating Task Interference in MLLMs via LoRA-MoE, arXiv:2311.02684",
    f"{PAPER}; rank, dropout, top_k, weights, no bias: {CODE}, which has shared_router=True; "
    f"the mean of a sequence without dim: {OURS}",
    example=Example((64, 64, 8), arguments={"dim": 24}, inputs={"embedding": "task"}),
)
def octavius(*, dim: int | None = None, rank: int = 32, dropout: float = 0.1, top_k: int = 2) -> Options:
    """The two best adapters of a sample, from its instruction; all of its tokens use them.

    dim: the width of Context.embedding, one instruction per sequence; if None, the mean of the layer's inputs over the
    sequence stands for it (a choice of ours, which sees later tokens too). rank, dropout, top_k and that the weights
    are a softmax over the chosen logits are those of the authors' code, which has 3 to 6 experts and one router for the
    whole model: adapters.add_lora_experts(model, 4, targets=[…], shared_router=True, **presets.octavius(dim=…)).
    """
    score: Any = partial(PerSequence, Linear) if dim is None else partial(FromEmbedding, dim=dim, bias=False)
    select = TopK(top_k, normalize=True)
    return {"layer": adapted_linear, "rank": rank, "dropout": dropout, "score": score, "select": select}


def _with_prior(
    hidden_size: int, num_experts: int, *, centroids: Tensor, weight: float, tau: float, **place: Any
) -> Sum:
    near = ClusterPrior(centroids, weight=weight, tau=tau, **place)
    return Sum(Linear(hidden_size, num_experts, **place), near)


@preset(
    "adapter",
    66,
    "Intuition-aware Mixture-of-Rank-1-Experts for Parameter Efficient Finetuning, arXiv:2404.08985",
    f"rank-1 experts: {PAPER}; form of the prior: {OURS}",
    unverified="top_k, weight, tau",
    example=Example(
        (64, 64, 8), arguments={"centroids": lambda: torch.ones(8, 24).cumsum(0)}, inputs={"embedding": "task"}
    ),
)
def mor1e(centroids: Tensor, *, top_k: int = 2, weight: float = 1.0, tau: float = 1.0) -> Options:
    """Experts of rank 1; the closeness of an instance to clusters of the corpus is added to the router's logits.

    centroids [E,D]: of a k-means of instances' embeddings, one cluster per expert; Context.embedding [B,D].
    """
    score = partial(_with_prior, centroids=centroids, weight=weight, tau=tau)
    return {"layer": adapted_linear, "rank": 1, "score": score, "select": TopK(top_k)}


@preset(
    "adapter",
    67,
    "Omni-SMoLA: Boosting Generalist Multimodal Models with Soft Mixture of Low-rank Experts, arXiv:2312.00968",
    f"{PAPER}, with one set of experts for all modalities",
    unverified="rank, slots",
    example=Example((64, 64, 8)),
)
def smola(*, rank: int = 4, slots: int = 1) -> Options:
    """A soft mixture of low-rank experts, added to a frozen module: nothing is discrete.

    Every token of a sequence affects every other, so not for causal models.
    """
    return {"layer": adapted_linear, "rank": rank, "slots": slots}


@preset(
    "adapter",
    68,
    "Learning to Route Among Specialized Experts for Zero-Shot Generalization, arXiv:2402.05859",
    f"{PAPER}; learning rate of train_gate: {CODE}, whose warm-up it lacks",
    example=Example((64, 64, 8)),
)
def phatgoose(*, rank: int = 16, top_k: int = 2) -> Options:
    """Adapters trained apart, each with a gate of its own: standardised gates and inputs make them comparable.

    adapters.train_gate trains a gate, and adapters.mixture(model, adapters) is the paper's model. rank is that of new
    adapters.
    """
    select = TopK(top_k, normalize=True)
    return {"layer": adapted_linear, "rank": rank, "score": PosthocGate, "select": select}


@preset(
    "adapter",
    69,
    "Self-MoE: Towards Compositional Large Language Models with Self-Specialized Experts, arXiv:2406.12034",
    f"{PAPER}; a router for each width of input: {OURS}",
    unverified="rank, top_k",
    example=Example((64, 64, 8)),
)
def self_moe(*, rank: int = 8, top_k: int = 1) -> Options:
    """Adapters specialised on synthetic data, and a router that all layers share, trained last.

    In a model: adapters.mixture(model, adapters, shared_router=True, **presets.self_moe()).
    """
    return {"layer": adapted_linear, "rank": rank, "select": TopK(top_k)}
