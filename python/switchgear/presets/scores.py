# SPDX-License-Identifier: BSD-3-Clause
"""Papers on how the router's logits are computed."""

from __future__ import annotations

from functools import partial
from typing import Any

from switchgear.checks import Size, checked
from switchgear.papers.parts.losses import BatchEntropy, LocalityLoss
from switchgear.papers.parts.masks import ExpertDropout, Masked, Temperature
from switchgear.papers.parts.scores import FromEmbedding, GroupedAvgPool, sigma_moe_values
from switchgear.papers.parts.stochastic import GumbelSoftmax
from switchgear.presets.entry import OURS, PAPER, Example, preset
from switchgear.routing import Cosine, Linear, SwitchLoss, TopK
from switchgear.routing.scores import Transform


@preset(
    "score",
    10,
    "On the Representation Collapse of Sparse Mixture of Experts, arXiv:2204.09179",
    f"{PAPER}; tau and balance_tau: of MoEC's code; torchscale does not use balance_tau",
    unverified="balance",
)
def xmoe(
    *,
    top_k: int = 1,
    dim: int | None = None,
    tau: float = 0.07,
    balance: float = 1e-2,
    balance_tau: float | None = None,
) -> dict[str, Any]:
    """Cosine similarity with expert embeddings in a low-dimensional space, divided by a learned temperature.

    dim is E/2 if None. The initial tau is that of this gate in MoEC's code. balance_tau: a fixed temperature for the
    probabilities of the balance loss, 0.07 in that code; the learned one if None, as in torchscale, which defines 0.07
    for it and does not use it.
    """
    score, select = partial(Cosine, dim=dim, tau=tau), TopK(top_k)
    losses: list[Any] = [partial(SwitchLoss, balance)]
    if balance_tau is None:
        return {"score": score, "select": select, "balance": losses}
    cosines = partial(Cosine, dim=dim, tau=1.0, learn_tau=False)  # the selection divides by the temperature
    return {"score": cosines, "select": partial(Temperature, select, tau, fixed=balance_tau), "balance": losses}


@preset(
    "score",
    11,
    "Approximating Two-Layer Feedforward Networks for Efficient Transformers, arXiv:2310.10837",
    f"{PAPER}, with its initial values; their factor √(2 / num_layers) only if num_layers is given",
)
@checked
def sigma_moe(
    *, top_k: int = 4, expert_dropout: float = 0.05, entropy: float = 1e-3, num_layers: Size | None = None
) -> dict[str, Any]:
    """Narrow ReLU experts without a gate; sigmoid scores, which do not compete; random experts are hidden from tokens
    in training; an entropy loss spreads the batch over the experts.

    Initial values are those of the paper, whose standard deviations have a factor √(2 / num_layers): num_layers is the
    number of layers of the model; None leaves the factor out. The paper's experts are 128 wide.
    """
    initialize: Any = sigma_moe_values
    if num_layers is not None:
        initialize = partial(sigma_moe_values, scale=(2 / num_layers) ** 0.5)
    return {
        "score": partial(Linear, equal_rows=True),
        "select": partial(Masked, TopK(top_k, "sigmoid"), ExpertDropout(expert_dropout)),
        "balance": [BatchEntropy(entropy)],
        "activation": "relu",
        "gated": False,
        "initialize": initialize,
    }


@preset(
    "score",
    14,
    "LocMoE: A Low-overhead MoE for Large Language Model Training, arXiv:2401.13920",
    f"score: {PAPER}; the loss is its divergence reversed, as the printed one is infinite: {OURS}",
    unverified="top_k, locality, the unit of min_capacity",
)
def locmoe(
    *, top_k: int = 1, num_nodes: int = 2, node: int = 0, locality: float = 1e-2, balance: float = 1e-2
) -> dict[str, Any]:
    """Logits are means of slices of x: orthogonal, without a matrix product. A loss keeps tokens on this node.

    num_nodes: each has equally many consecutive experts; node: this process's node. locality is the paper's μ. The loss
    is KL(D_local || D_c): the paper prints the reverse, which is infinite as soon as one token leaves. The paper's
    lower bound of a capacity is an option: capacity=Capacity(factor, minimum=math.ceil(
    routing.min_capacity(delta, H, E))).
    """
    return {
        "score": GroupedAvgPool,
        "select": TopK(top_k),
        "balance": [partial(SwitchLoss, balance), partial(LocalityLoss, num_nodes, node, locality)],
    }


@preset(
    "score",
    24,
    "A General Theory for Softmax Gating Multinomial Logistic Mixture of Experts, arXiv:2310.14188",
    f"{PAPER}; which bounded transform: {OURS}",
    unverified="transform",
)
def bounded_gate(*, top_k: int = 2, transform: Transform = "tanh") -> dict[str, Any]:
    """The router sees a bounded transform of x: with x itself, vanishing experts slow the estimation.

    transform: "tanh", "sigmoid", "normalize" or "layer_norm".
    """
    return {"score": partial(Linear, input_transform=transform), "select": TopK(top_k)}


@preset(
    "score",
    34,
    "Eliciting and Understanding Cross-Task Skills with Task-Level Mixture-of-Experts, arXiv:2205.12701",
    f"{PAPER}; its code has a router of two layers (64 units, GELU), tau = max(2·exp(-3e-4·step), 0.1), and noise "
    "in evaluation too",
    unverified="tau",
    example=Example(arguments={"dim": 24}, inputs={"embedding": "task"}),
)
def task_level(*, dim: int, tau: float = 1.0) -> dict[str, Any]:
    """The embedding of a task chooses one expert for all of its tokens, by a straight-through Gumbel softmax.

    dim: of the embedding [B,dim], one per sequence.
    """
    return {
        "score": partial(FromEmbedding, dim=dim),
        "select": GumbelSoftmax(tau, hard=True, level="sequence"),
    }
