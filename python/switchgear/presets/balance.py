# SPDX-License-Identifier: BSD-3-Clause
"""Papers on balancing the load of experts."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from switchgear.papers.parts.controllers import AdaptiveCoefficient, QuantileBias
from switchgear.papers.parts.losses import ClusterVariance, DeviceBalance
from switchgear.papers.parts.masks import ClusterDropout, Masked
from switchgear.presets.entry import CODE, OURS, PAPER, Example, preset
from switchgear.routing import Capacity, Cosine, Linear, LossFreeBias, SwitchLoss, TopK, ZLoss


@preset(
    "structure",
    3,
    "DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models, arXiv:2401.06066",
    PAPER,
    example=Example((64, 8, 64)),
)
def deepseek_moe(
    *,
    top_k: int = 6,
    num_shared_experts: int = 2,
    balance: float = 0.001,
    num_devices: int | None = None,
    device_balance: float | None = None,
) -> dict[str, Any]:
    """Many narrow experts plus shared ones, and losses that balance experts and devices.

    The constants are those of the paper's 16B model, which has 64 routed experts of a quarter of the usual width. The
    2B model has 63, top_k = 7, one shared expert and balance = 0.01; the 145B model 128 of an eighth, top_k = 12, four
    shared experts, balance = 0.003 and the device loss. num_devices: adds the device loss. device_balance: its
    coefficient; if None, the paper's 0.05.
    """
    if num_devices is None and device_balance is not None:
        raise ValueError(f"num_devices: expected a number with device_balance={device_balance}, got None")
    losses: list[Any] = [partial(SwitchLoss, balance, per_choice=True)]
    if num_devices is not None:
        losses.append(partial(DeviceBalance, num_devices, 0.05 if device_balance is None else device_balance))
    return {"select": TopK(top_k), "balance": losses, "num_shared_experts": num_shared_experts}


@preset(
    "balance",
    4,
    "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, arXiv:2408.15664",
    f'{PAPER}; rule "proportional" divides by the mean load: {OURS}',
)
def loss_free(*, top_k: int = 6, rate: float = 1e-3, rule: Literal["sign", "proportional"] = "sign") -> dict[str, Any]:
    """A selection bias rises for experts with too few tokens and falls for the others; there is no loss.

    switchgear.after_step(model) updates the bias; call it once per optimizer step. rule = "proportional" divides each
    difference of load by the mean load; the paper's variant does not, so its rate is rate / the mean load.
    """
    return {"select": TopK(top_k, "sigmoid"), "balance": [LossFreeBias(rate, rule)]}


@preset(
    "balance",
    None,
    "Quantile balancing, https://kexue.fm/archives/11619",
    f"formula of the code in Megatron-Core and torchtitan; a histogram of all calls of a step: {OURS}",
    unverified="top_k",
)
def quantile_balance(*, top_k: int = 2, bins: int = 1000) -> dict[str, Any]:
    """A selection bias with which the tokens of the last step would have loaded all experts alike: neither a loss nor a
    rate.

    switchgear.after_step(model) updates the bias; call it once per optimizer step.
    """
    return {"select": TopK(top_k, "sigmoid", normalize=True), "balance": [partial(QuantileBias, bins=bins)]}


@preset(
    "balance",
    5,
    "Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized "
    "Mixture-of-Expert Models, arXiv:2501.11873",
    PAPER,
    unverified="top_k, balance",
)
def global_balance(*, top_k: int = 2, balance: float = 1e-2) -> dict[str, Any]:
    """The balance loss counts over all processes and micro-batches of a step, so a single sequence may be unbalanced.

    switchgear.after_step(model) ends a step.
    """
    return {"select": TopK(top_k), "balance": [partial(SwitchLoss, balance, "global", accumulate=True)]}


@preset(
    "score",
    13,
    "Skywork-MoE: A Deep Dive into Training Techniques for Mixture-of-Experts Language Models, arXiv:2406.06563",
    f"{PAPER}; population deviation, and SwitchLoss instead of the printed Σ_e (1/E - P_e)²: {OURS}",
    unverified="capacity_factor, initial coefficient",
)
def skywork(
    *,
    top_k: int = 2,
    lam: float = 1.0,
    capacity_factor: float = 1.0,
    xi: float = 0.2,
    alpha_max: float = 0.01,
    beta: float = 0.99,
) -> dict[str, Any]:
    """Logits normalised per token to mean 0 and deviation lam; a balance loss whose coefficient follows dropped tokens.

    The weights of the chosen experts sum to 1. switchgear.after_step(model) updates the coefficient.
    """
    coefficient = partial(AdaptiveCoefficient, xi, alpha_max, beta)
    return {
        "score": partial(Linear, bias=True, normalize="zscore", lam=lam),
        "select": TopK(top_k, normalize=True),
        "capacity": Capacity(capacity_factor),
        "balance": [partial(SwitchLoss, coefficient)],
    }


@preset(
    "balance",
    20,
    "MoEC: Mixture of Expert Clusters, arXiv:2207.09094",
    f"loss and constants: {CODE}, with means over tokens for its sums; losses of the learned temperature, and the "
    f"softmax as weight, without the rest of the input: {OURS}",
    example=Example((64, 32, 64)),
)
def moec(
    *,
    num_clusters: int = 8,
    clusters: float = 41.0,
    dropout: float = 0.5,
    interval: int = 250,
    balance: float = 1e-2,
) -> dict[str, Any]:
    """Clusters of experts: a loss equalises probabilities inside a cluster, and in training part of each cluster is
    closed.

    Constants are those of the published command, which has 64 experts. clusters: the coefficient of ClusterVariance.
    The code sums probabilities over the tokens of a process instead of averaging them, so its coefficient is 0.01 for
    each token: 41 for its 4,096. The code also takes probabilities of the fixed temperature 0.07 for the losses, and
    returns a · expert(x) + (1 - a) · x with a sigmoid a; here they are those of the learned temperature, and the weight
    is the softmax. switchgear.after_step(model) counts the steps between draws.
    """
    mask = partial(ClusterDropout, num_clusters, dropout, interval)
    return {
        "score": partial(Cosine, dim=32),
        "select": partial(Masked, TopK(1), mask),
        "capacity": Capacity(2.0),
        "balance": [partial(SwitchLoss, balance), partial(ClusterVariance, num_clusters, clusters)],
    }


@preset(
    "balance",
    21,
    "Solving Token Gradient Conflict in Mixture-of-Experts for Large Vision-Language Model, arXiv:2406.19905",
    f"test of conflict: {PAPER}; loss: {OURS}",
    unverified="the tau of GradientConflict, balance",
)
def gradient_conflict(*, top_k: int = 2, balance: float = 1e-2) -> dict[str, Any]:
    """Tokens whose gradients conflict with those of their expert's other tokens are pushed away from it.

    The loss needs gradients, so the trainer calls routing.GradientConflict(tau) with the layer's output and Routing,
    which the layer returns.
    """
    return {"select": TopK(top_k), "balance": [partial(SwitchLoss, balance)], "return_routing": True}


@preset(
    "balance",
    35,
    "OpenMoE: An Early Effort on Open Mixture-of-Experts Language Models, arXiv:2402.01739",
    f"{PAPER}; first choices first, evaluation_factor, min_capacity: of training code; capacity rounded up: {OURS}",
    unverified="capacity_factor",
    example=Example((64, 32, 32), options={"num_shared_experts": 1}),
)
def openmoe(
    *,
    top_k: int = 2,
    capacity_factor: float = 1.25,
    evaluation_factor: float = 2.0,
    min_capacity: int = 4,
    balance: float = 1e-2,
    z: float = 1e-4,
) -> dict[str, Any]:
    """Two experts per token, a capacity that first choices fill before second ones, each in token order, and losses
    that balance the load and keep logits small.

    The paper uses 32 experts plus a dense path. It finds that later tokens of a sequence are dropped more often than
    earlier ones. balance and z are the paper's. The order of choices, evaluation_factor and min_capacity are those of
    training code (ColossalAI, whose capacity is ⌊factor · K·T/E⌋ made even, and flaxformer, where it is factor · T/E
    rounded; here it is ⌈factor · K·T/E⌉).
    """
    return {
        "select": TopK(top_k),
        "capacity": Capacity(capacity_factor, drop="choice", evaluation_factor=evaluation_factor, minimum=min_capacity),
        "balance": [partial(SwitchLoss, balance), ZLoss(z)],
    }
