# SPDX-License-Identifier: BSD-3-Clause
"""Papers on which experts a token gets, and how many tokens an expert accepts."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from switchgear.papers.parts.controllers import AdaptiveSparsity, RunningThreshold
from switchgear.papers.parts.losses import AlignmentLoss, DeviceBalance, EntropyLoss
from switchgear.papers.parts.masks import Masked, TokenIdMask
from switchgear.papers.parts.scores import SwitchMixture
from switchgear.papers.parts.selections import BalancedAssignment, Broadcast, Positive
from switchgear.papers.parts.stochastic import GumbelSoftmax, Level, NoisyTopK, Random, SparseMixer
from switchgear.presets.entry import CODE, OURS, PAPER, Example, preset
from switchgear.routing import Capacity, Dropless, ExpertChoice, Grouped, Linear, SwitchLoss, TopK, TopP
from switchgear.routing.capacity import Drop, Overflow
from switchgear.routing.context import Scope


@preset(
    "selection",
    1,
    "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity, arXiv:2101.03961",
    f"{PAPER}; evaluation_factor, jitter, min_capacity: of its code; capacity rounded up, where that truncates: {OURS}",
)
def switch(
    *,
    capacity_factor: float = 1.25,
    evaluation_factor: float = 2.0,
    jitter: float = 1e-2,
    balance: float = 1e-2,
    min_capacity: int = 4,
) -> dict[str, Any]:
    """The best expert, weighted by its probability; a capacity in token order; a balance loss; a float32 router.

    A dropped token gets zeros, so only the residual passes it on. The paper trains with capacity_factor 1.0 to 1.25.
    evaluation_factor, jitter and min_capacity, the least number of tokens that an expert accepts, are those of the
    authors' code.
    """
    return {
        "score": partial(Linear, float32=True),
        "jitter": jitter,
        "select": TopK(1),
        "capacity": Capacity(capacity_factor, evaluation_factor=evaluation_factor, minimum=min_capacity),
        "balance": [partial(SwitchLoss, balance)],
    }


@preset(
    "selection",
    None,
    "GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding, arXiv:2006.16668",
    f"{PAPER}, without random second experts; the loss counts both choices: {OURS}",
    unverified="capacity_factor, balance",
)
def gshard(*, capacity_factor: float = 1.0, balance: float = 1e-2) -> dict[str, Any]:
    """The two best experts, normalised; first choices take capacity before second ones, in token order.

    The capacity is capacity_factor · 2T/E. The paper's loss counts first choices only, this one both. The paper's
    random skipping of second experts is not implemented.
    """
    return {
        "select": TopK(2, normalize=True),
        "capacity": Capacity(capacity_factor, drop="choice"),
        "balance": [partial(SwitchLoss, balance)],
    }


@preset("selection", 2, "Mixture-of-Experts with Expert Choice Routing, arXiv:2202.09368", PAPER)
def expert_choice(
    *,
    capacity_factor: float = 2.0,
    max_experts_per_token: int | None = None,
    scope: Scope = "batch",
    evaluation: int | None = None,
) -> dict[str, Any]:
    """Each expert takes its best capacity_factor · T/E tokens: the load is even without a loss.

    Tokens compete with later tokens of the batch, so a decoder must set `evaluation`, the number of best experts per
    token in evaluation. max_experts_per_token is the cap of the paper's variants CAP2 and CAP3.
    """
    select = ExpertChoice(
        capacity_factor, scope=scope, max_experts_per_token=max_experts_per_token, evaluation=evaluation
    )
    return {"select": select}


@preset(
    "capacity",
    80,
    "Stealing User Prompts from Mixture of Experts, arXiv:2410.22884",
    "the paper's defence: competition within a sequence",
)
def isolated_expert_choice(*, capacity_factor: float = 2.0, evaluation: int | None = None) -> dict[str, Any]:
    """Expert choice inside each sequence, ties to the lowest token: a sequence learns nothing about another."""
    return {
        "select": ExpertChoice(capacity_factor, scope="sequence", ties="index", evaluation=evaluation),
        "isolation": "sequence",
    }


@preset("capacity", 79, "Buffer Overflow in Mixture of Experts, arXiv:2402.05526", "the paper's defence: no capacity")
def batch_independent(*, top_k: int = 2) -> dict[str, Any]:
    """The best experts and no capacity; a policy that replaces it is restricted to each sequence. Other users' tokens
    in the batch change no result.
    """
    return {"select": TopK(top_k), "capacity": Dropless(), "isolation": "sequence"}


@preset(
    "selection",
    6,
    "BASE Layers: Simplifying Training of Large, Sparse Models, arXiv:2103.16716",
    f"{PAPER}; the auction's bids and tolerance: {OURS}",
)
def base_layer(*, eps: float | str = "auto", max_iterations: int = 1000) -> dict[str, Any]:
    """Balanced assignment in training, the best expert in evaluation, weighted by a sigmoid; no loss.

    The caller adds the norm before the experts, the residual, and the paper's shuffling of tokens between processes.
    """
    return {
        "score": partial(Linear, orthogonal=0.1),
        "select": BalancedAssignment(eps, max_iterations),
    }


@preset(
    "selection",
    7,
    "Harder Tasks Need More Experts: Dynamic Routing in MoE Models, arXiv:2403.07652",
    f"{PAPER}; its code takes one expert more if the sum meets p exactly",
)
def dynamic_top_p(
    *, p: float = 0.4, max_experts: int | None = None, balance: float = 1e-2, entropy: float = 1e-4
) -> dict[str, Any]:
    """The fewest experts whose probabilities sum to at least p, and an entropy loss that keeps them few."""
    return {"select": TopP(p, max_experts), "balance": [partial(SwitchLoss, balance), EntropyLoss(entropy)]}


@preset(
    "selection",
    12,
    "GRIN: GRadient-INformed MoE, arXiv:2409.12136",
    "formula of the code of Phi-3.5-MoE in Hugging Face transformers",
    unverified="balance",
)
def grin(*, top_k: int = 2, jitter: float = 0.01, balance: float = 1e-2) -> dict[str, Any]:
    """Training draws experts one after another, with the SparseMixer-v2 gradient estimate; balance over all
    processes."""
    return {"select": SparseMixer(top_k, jitter), "balance": [partial(SwitchLoss, balance, "global")]}


@preset(
    "selection",
    15,
    "Towards More Effective and Economic Sparsely-Activated Model, arXiv:2110.07431",
    f"{PAPER}; the form of alignment: {OURS}",
    unverified="balance, alignment",
)
def sam(*, num_groups: int = 4, top_k: int = 2, balance: float = 1e-2, alignment: float = 0.0) -> dict[str, Any]:
    """A router chooses one group of experts and another router top_k experts in it: a token uses one device.

    One loss balances groups. alignment > 0 adds AlignmentLoss, so that the best of all experts lie in the chosen group.
    """
    aligns = [partial(AlignmentLoss, num_groups, alignment)] if alignment else []
    return {
        "score": partial(SwitchMixture, num_groups=num_groups),
        "select": Grouped(top_k, num_groups),
        "balance": [partial(DeviceBalance, num_groups, balance), *aligns],
    }


@preset(
    "selection",
    16,
    "MaskMoE: Boosting Token-Level Learning via Routing Mask in Mixture-of-Experts, arXiv:2407.09816",
    PAPER,
    unverified="frequent_from, top_k, balance",
    example=Example(
        arguments={"counts": lambda: torch.arange(100), "frequent_from": 50}, inputs={"token_ids": "token_ids"}
    ),
)
def maskmoe(
    counts: Tensor, *, frequent_from: float, top_k: int = 1, rare_experts: int = 1, balance: float = 1e-2
) -> dict[str, Any]:
    """A fixed random mask for each vocabulary id: rare ids see one expert, frequent ones all.

    counts [V]: how often each id occurs in the corpus. frequent_from is the paper's threshold.
    """
    mask = partial(TokenIdMask.of_frequencies, counts, frequent_from=frequent_from, rare_experts=rare_experts)
    return {"select": partial(Masked, TopK(top_k), mask), "balance": [partial(SwitchLoss, balance)]}


@preset("selection", 18, "Taming Sparsely Activated Transformer with Stochastic Experts, arXiv:2110.04260", PAPER)
def thor(
    *,
    level: Level = "batch",
    evaluation: Literal["random", "token", "sequence", "ensemble"] = "token",
) -> dict[str, Any]:
    """A random expert, drawn per batch in training and per token in evaluation; there is no router to train.

    The trainer runs two passes and adds routing.consistency_loss of their outputs. level = "sequence" or "token" draws
    for each of them in training. evaluation: "token" or "sequence", as in the authors' code, "random" for draws as in
    training, or "ensemble" for the average of all experts.
    """
    return {"select": Random(1, level, evaluation)}


@preset(
    "selection",
    19,
    "GW-MoE: Resolving Uncertainty in MoE Router with Global Workspace Theory, arXiv:2406.12375",
    f"{PAPER}; its Switch code multiplies the experts' input instead, and counts the best expert alone in the loss",
)
def gw_moe(
    *, top_k: int = 2, entropy_above: float = 0.0, max_fraction: float = 0.05, running: bool = False
) -> dict[str, Any]:
    """In training, tokens with uncertain routing go to all experts.

    entropy_above: the paper's H*, in nats, chosen so that about 5 % of the tokens exceed it; with 0, max_fraction
    decides, in each batch: none of ten tokens or fewer. running: a threshold in place of both that max_fraction of all
    tokens exceed, whatever the batch; switchgear.after_step(model) updates it.
    """
    if running:
        return {"select": Broadcast(TopK(top_k), partial(RunningThreshold, max_fraction), 1.0)}
    return {"select": Broadcast(TopK(top_k), entropy_above, max_fraction)}


@preset("selection", 25, "(GG) MoE vs. MLP on Tabular Data, arXiv:2502.03608", f"{PAPER}; bias, tau, samples: {CODE}")
def gumbel_gate(*, tau: float = 1.0, samples: int = 5) -> dict[str, Any]:
    """All experts, weighted by a softmax with Gumbel noise; evaluation averages several draws.

    samples: number of draws averaged in evaluation; 0 gives the plain softmax, which is another function. tau, samples
    and the router's bias are those of the authors' code.
    """
    return {"router_bias": True, "select": GumbelSoftmax(tau, samples=samples)}


@preset(
    "selection",
    33,
    "Patch-level Routing in Mixture-of-Experts is Provably Sample-efficient for Convolutional Neural "
    "Networks, arXiv:2306.04073",
    f"{PAPER}; its code for CIFAR-10 and CelebA takes the softmax over all patches before the choice",
)
def pmoe(*, patches: int = 4) -> dict[str, Any]:
    """Each expert takes the `patches` best patches of a sample, weighted by a softmax over them, and averages."""
    select = ExpertChoice(tokens_per_expert=patches, scope="sequence", weights="softmax_over_tokens", scale=1 / patches)
    return {"select": select}


@preset(
    "capacity",
    36,
    "Capacity-Aware Inference: Mitigating the Straggler Effect in Mixture of Experts, arXiv:2503.05066",
    f"{PAPER}, reroute of its first version; which scores rank, and all experts as candidates: {CODE}",
    unverified="gamma",
)
def capacity_aware(
    *,
    top_k: int = 2,
    gamma: float = 1.5,
    drop: Drop = "score",
    overflow: Overflow = "reroute",
    expand: float | None = None,
    normalize: bool = False,
) -> dict[str, Any]:
    """In evaluation only, an expert accepts at most gamma · K·T/E tokens, those of largest score; the others go to
    experts with free capacity. Decoding steps have no limit.

    gamma is 1 to 2 in the paper. overflow = "drop" is its token drop, "reroute" that of its first version, which later
    ones replaced by the expanded drop, "overselect": each token first adds its device's experts to its best K, and then
    each expert drops tokens. expand: ⌈K · expand⌉ candidates per token, of which it keeps at most K, as in a patch
    among its code; if None, all experts, and all that keep the token, as in its models on one device. normalize: for
    models that normalise the weights of a token, which are normalised again after a drop. Scores are the probabilities
    before that, as in its code.
    """
    return {
        "select": TopK(top_k, normalize=normalize),
        "capacity": Capacity(
            math.inf, drop, overflow, expand=expand, evaluation_factor=gamma, renormalize=normalize, prefill_only=True
        ),
    }


@preset("selection", 32, "Towards Understanding Mixture of Experts in Deep Learning, arXiv:2208.02813", PAPER)
def cluster_task(*, noise: float = 1.0) -> dict[str, Any]:
    """The best expert by logits plus uniform noise, weighted by its probability without the noise.

    examples/cluster_task.py contains the paper's task.
    """
    return {"select": NoisyTopK(1, noise)}


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
