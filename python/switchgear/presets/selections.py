# SPDX-License-Identifier: BSD-3-Clause
"""Papers about which experts a token gets, and how many tokens an expert takes."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor

from switchgear.routing import (
    BalancedAssignment,
    Broadcast,
    Capacity,
    DeviceBalance,
    Dropless,
    EntropyLoss,
    ExpertChoice,
    Grouped,
    GumbelSoftmax,
    Linear,
    Masked,
    NoisyTopK,
    Random,
    SparseMixer,
    SwitchLoss,
    SwitchMixture,
    TokenIdMask,
    TopK,
    TopP,
)


def switch(
    *,
    capacity_factor: float = 1.25,
    evaluation_factor: float = 2.0,
    jitter: float = 1e-2,
    balance: float = 1e-2,
) -> dict[str, Any]:
    """The best expert, weighed by its probability; a capacity in order of arrival; a balance loss; a router in float32.

    Paper: Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity, arXiv:2101.03961
    Example: MoE(64, 32, 8, **presets.switch())(x)

    A dropped token gets zeros: it passes through the residual. capacity_factor is 1.0 to 1.25 in training there;
    evaluation_factor and jitter are unverified.
    """  # noqa: E501
    return {
        "score": partial(Linear, float32=True, jitter=jitter),
        "select": TopK(1),
        "capacity": Capacity(capacity_factor, evaluation_factor=evaluation_factor),
        "balance": [partial(SwitchLoss, balance)],
    }


def gshard(*, capacity_factor: float = 1.0, balance: float = 1e-2) -> dict[str, Any]:
    """The two best experts, normalised; first choices find a place before second ones, in order of arrival.

    Paper: GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding, arXiv:2006.16668
    Example: MoE(64, 32, 8, **presets.gshard())(x)

    The capacity is capacity_factor · 2T/E; both constants are unverified. Its loss counts first choices alone, this one
    both; its random skipping of second experts is not there.
    """
    return {
        "select": TopK(2, normalize=True),
        "capacity": Capacity(capacity_factor, drop="choice"),
        "balance": [partial(SwitchLoss, balance)],
    }


def expert_choice(
    *,
    capacity_factor: float = 2.0,
    max_experts_per_token: int | None = None,
    scope: str = "batch",
    evaluation: int | None = None,
) -> dict[str, Any]:
    """Each expert takes its best tokens, capacity_factor · T/E of them: the load is even, without a loss.

    Paper: Mixture-of-Experts with Expert Choice Routing, arXiv:2202.09368
    Example: MoE(64, 32, 8, **presets.expert_choice())(x)

    Tokens of a batch compete, later ones with earlier ones too: a decoder sets `evaluation`, the number of best experts
    that a token gets then. capacity_factor = 2 is unverified. max_experts_per_token is the cap of its variants CAP2,
    CAP3.
    """
    select = ExpertChoice(
        capacity_factor, scope=scope, max_experts_per_token=max_experts_per_token, evaluation=evaluation
    )
    return {"select": select}


def isolated_expert_choice(*, capacity_factor: float = 2.0, evaluation: int | None = None) -> dict[str, Any]:
    """Expert choice inside each sequence, ties to the lowest token: no sequence can find out about another.

    Paper: Stealing User Prompts from Mixture of Experts, arXiv:2410.22884
    Example: MoE(64, 32, 8, **presets.isolated_expert_choice())(x)
    """
    return {
        "select": ExpertChoice(capacity_factor, scope="sequence", ties="index", evaluation=evaluation),
        "isolation": "sequence",
    }


def batch_independent(*, top_k: int = 2) -> dict[str, Any]:
    """The best experts and no capacity, and whatever policy is put instead stays inside a sequence: no stranger's token
    in the batch changes a result.

    Paper: Buffer Overflow in Mixture of Experts, arXiv:2402.05526
    Example: MoE(64, 32, 8, **presets.batch_independent())(x)
    """
    return {"select": TopK(top_k), "capacity": Dropless(), "isolation": "sequence"}


def base_layer(*, eps: float | str = "auto", max_iterations: int = 100) -> dict[str, Any]:
    """Balanced assignment in training, the best expert in evaluation, weighed by a sigmoid; no loss.

    Paper: BASE Layers: Simplifying Training of Large, Sparse Models, arXiv:2103.16716
    Example: MoE(64, 32, 8, **presets.base_layer())(x)

    The norm before the experts and the residual are the caller's, and so is its shuffling of tokens between processes.
    """
    return {
        "score": partial(Linear, orthogonal=0.1),
        "select": BalancedAssignment(eps, max_iterations),
    }


def dynamic_top_p(
    *, p: float = 0.4, max_experts: int | None = None, balance: float = 1e-2, entropy: float = 1e-4
) -> dict[str, Any]:
    """The fewest experts whose probabilities add up to p, and a loss of entropy that keeps them few.

    Paper: Harder Tasks Need More Experts: Dynamic Routing in MoE Models, arXiv:2403.07652
    Example: MoE(64, 32, 8, **presets.dynamic_top_p())(x)
    """
    return {"select": TopP(p, max_experts), "balance": [partial(SwitchLoss, balance), EntropyLoss(entropy)]}


def grin(*, top_k: int = 2, jitter: float = 0.01, balance: float = 1e-2) -> dict[str, Any]:
    """Experts drawn one after the other in training, with the SparseMixer-v2 estimate of the gradient; balance over all
    processes.

    Paper: GRIN: GRadient-INformed MoE, arXiv:2409.12136
    Example: MoE(64, 32, 8, **presets.grin())(x)

    The coefficient of the balance loss is unverified.
    """
    return {"select": SparseMixer(top_k, jitter), "balance": [partial(SwitchLoss, balance, "global")]}


def sam(*, num_groups: int = 4, top_k: int = 2, balance: float = 1e-2) -> dict[str, Any]:
    """One group of experts, by a router of groups, and top_k experts of it, by another: a token goes to one device.

    Paper: Towards More Effective and Economic Sparsely-Activated Model, arXiv:2110.07431
    Example: MoE(64, 32, 8, **presets.sam())(x)

    The loss balances groups; its coefficient, and the paper's terms that align the two routers, are unverified and the
    latter left out.
    """
    return {
        "score": partial(SwitchMixture, num_groups=num_groups),
        "select": Grouped(top_k, num_groups),
        "balance": [partial(DeviceBalance, num_groups, balance)],
    }


def maskmoe(
    counts: Tensor, *, frequent_from: float, top_k: int = 1, rare_experts: int = 1, balance: float = 1e-2
) -> dict[str, Any]:
    """A fixed random mask for each vocabulary id: rare ids see one expert, frequent ones all.

    Paper: MaskMoE: Boosting Token-Level Learning via Routing Mask in Mixture-of-Experts, arXiv:2407.09816
    Example: MoE(64, 32, 8, **presets.maskmoe(torch.arange(100), frequent_from=50))(x, token_ids=token_ids)

    counts [V]: how often the corpus has each id. frequent_from is the paper's threshold (unverified), as are top_k and
    the coefficient.
    """
    mask = partial(TokenIdMask.of_frequencies, counts, frequent_from=frequent_from, rare_experts=rare_experts)
    return {"select": partial(Masked, TopK(top_k), mask), "balance": [partial(SwitchLoss, balance)]}


def thor(*, level: str = "batch", evaluation: str = "random") -> dict[str, Any]:
    """A random expert, drawn for the batch, each sequence or each token; there is no router to train.

    Paper: Taming Sparsely Activated Transformer with Stochastic Experts, arXiv:2110.04260
    Example: MoE(64, 32, 8, **presets.thor())(x)

    The trainer runs two passes and adds routing.consistency_loss of their outputs. evaluation = "ensemble" is the mean
    of all experts.
    """
    return {"select": Random(1, level, evaluation)}


def gw_moe(*, top_k: int = 2, entropy_above: float = 0.0, max_fraction: float = 0.05) -> dict[str, Any]:
    """In training, the tokens that the router is least sure of go to all experts.

    Paper: GW-MoE: Resolving Uncertainty in MoE Router with Global Workspace Theory, arXiv:2406.12375
    Example: MoE(64, 32, 8, **presets.gw_moe())(x)

    entropy_above: the paper's H*, in nats, chosen so that about 5 % of the tokens exceed it; 0 leaves it to
    max_fraction.
    """
    return {"select": Broadcast(TopK(top_k), entropy_above, max_fraction)}


def gumbel_gate(*, tau: float = 1.0, samples: int = 0) -> dict[str, Any]:
    """All experts, weighed by a softmax with Gumbel noise in training.

    Paper: (GG) MoE vs. MLP on Tabular Data, arXiv:2502.03608
    Example: MoE(64, 32, 8, **presets.gumbel_gate())(x)

    samples: draws that evaluation averages, none for the plain softmax. tau is unverified.
    """
    return {"select": GumbelSoftmax(tau, samples=samples)}


def pmoe(*, patches: int = 4) -> dict[str, Any]:
    """Each expert takes the `patches` best patches of a sample, weighed by a softmax over them, and averages.

    Paper: Patch-level Routing in Mixture-of-Experts is Provably Sample-efficient for Convolutional Neural Networks, arXiv:2306.04073
    Example: MoE(64, 32, 8, **presets.pmoe())(x)
    """  # noqa: E501
    select = ExpertChoice(tokens_per_expert=patches, scope="sequence", weights="softmax_over_tokens", scale=1 / patches)
    return {"select": select}


def capacity_aware(
    *, top_k: int = 2, gamma: float = 1.5, drop: str = "score", overflow: str = "reroute", expand: float | None = None
) -> dict[str, Any]:
    """In evaluation alone, an expert takes at most gamma · K·T/E tokens, those of the largest weight; the others go to
    experts that have room.

    Paper: Capacity-Aware Inference: Mitigating the Straggler Effect in Mixture of Experts, arXiv:2503.05066
    Example: MoE(64, 32, 8, **presets.capacity_aware())(x)

    gamma is 1 to 2 in the paper. overflow = "drop" is its token drop. expand: ⌈K · expand⌉ candidates of a token, all
    experts if None.
    """
    return {
        "select": TopK(top_k),
        "capacity": Capacity(math.inf, drop, overflow, expand=expand, evaluation_factor=gamma),
    }


def cluster_task(*, noise: float = 1.0) -> dict[str, Any]:
    """The best expert of the logits plus uniform noise, weighed by its probability without the noise.

    Paper: Towards Understanding Mixture of Experts in Deep Learning, arXiv:2208.02813
    Example: MoE(64, 32, 8, **presets.cluster_task())(x)

    examples/cluster_task.py has its task.
    """
    return {"select": NoisyTopK(1, noise)}
