# SPDX-License-Identifier: BSD-3-Clause
"""Papers whose layer combines several. Their dicts name its builder as "layer": a function of (hidden_size,
intermediate_size, num_experts) and the other options; see presets.build."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from torch import nn

from switchgear.checks import Size, checked
from switchgear.experts import Experts
from switchgear.layers.shared import SharedExperts
from switchgear.modules import MoE
from switchgear.papers.layers.autonomous import AutonomousMoE
from switchgear.papers.layers.composed import CartesianMoE, MultiHeadMoE, SoftMoE
from switchgear.papers.layers.merged import MergedExperts
from switchgear.papers.layers.monet import Mode, Monet
from switchgear.papers.layers.stitched import Stitched
from switchgear.papers.layers.stratified import StratifiedMoE
from switchgear.papers.parts.controllers import RunningCap
from switchgear.presets.entry import CODE, OURS, PAPER, Example, preset
from switchgear.routing import Capacity, Dense, ImportanceLoad, Linear, Router, SwitchLoss, TopK

Options = dict[str, Any]


def _device(options: Options) -> Options:
    return {name: options[name] for name in ("device", "dtype") if name in options}


def autonomous_moe(hidden_size: int, intermediate_size: int, num_experts: int, **options: Any) -> AutonomousMoE:
    """AutonomousMoE; the default d_low gives it as many parameters as gated experts of intermediate_size."""
    if options.get("d_low") is None:  # E · (d_low·(H + I) + 2·H·I) = E · 3·H·I
        product = hidden_size * intermediate_size
        options["d_low"] = max(round(product / (hidden_size + intermediate_size)), 1)
    return AutonomousMoE(hidden_size, intermediate_size, num_experts, **options)


@preset("score", 23, "Autonomy-of-Experts Models, arXiv:2501.13074", f"{PAPER}; normalize=False: {CODE}")
def autonomy_of_experts(
    *, top_k: int = 2, d_low: int | None = None, balance: float = 1e-2, normalize: bool = True
) -> Options:
    """Experts choose their tokens by the norm of their own first activation, which the chosen experts reuse.

    The weights are a softmax over the norms of the chosen experts; normalize = False: over those of all experts, as in
    the released code. d_low: rank of the first projection; if None, the layer has as many parameters as one of gated
    experts of this intermediate_size. The paper instead takes d_low, best near H/3, and sets intermediate_size to
    (3·H·F - d_low·H) / (d_low + 2·H) (equation 5), which has as many as gated experts of width F.
    """
    losses = [partial(SwitchLoss, balance)]
    return {"layer": autonomous_moe, "top_k": top_k, "d_low": d_low, "balance": losses, "normalize": normalize}


@checked
def stacked(
    hidden_size: int, intermediate_size: int, num_experts: int, *, depth: Size = 2, **options: Any
) -> nn.Sequential:
    """`depth` consecutive MoE layers with these options."""
    return nn.Sequential(*(MoE(hidden_size, intermediate_size, num_experts, **options) for _ in range(depth)))


@preset(
    "structure",
    26,
    "Learning Factored Representations in a Deep Mixture of Experts, arXiv:1312.4314",
    f"the cap: {PAPER}, with the totals from before each call; linear gates and experts of two layers: {OURS}",
    unverified="margin",
    example=Example((64, 32, 4)),
)
def deep_mixture(*, margin: float = 100.0, depth: int = 2) -> Options:
    """Two consecutive layers that use all experts; those ahead of the others by a margin are closed.

    Meant for early training: margin, in tokens, is an attribute of each layer's gate.select. Gates are
    linear and experts those of MoE; the paper's gate has a hidden layer with ReLU, and its experts are relu(W·x + b).
    """
    return {"layer": stacked, "depth": depth, "select": partial(RunningCap, Dense(), margin)}


def cartesian_moe(hidden_size: int, intermediate_size: int, num_experts: int, **options: Any) -> CartesianMoE:
    """CartesianMoE of two MoE layers, each of half the width."""
    if intermediate_size % 2:
        raise ValueError(f"intermediate_size: expected an even number, for two halves, got {intermediate_size}")
    first, second = (MoE(hidden_size, intermediate_size // 2, num_experts, **options) for _ in range(2))
    return CartesianMoE(first, second, hidden_size, **_device(options))


@preset(
    "structure",
    27,
    "CartesianMoE: Boosting Knowledge Sharing among Experts via Cartesian Product Routing in "
    "Mixture-of-Experts, arXiv:2410.16077",
    PAPER,
    unverified="top_k, num_shared_experts, balance",
)
def cartesian(*, top_k: int = 2, num_shared_experts: int = 1, balance: float = 1e-2) -> Options:
    """Two consecutive layers of experts: E · E pairs that share halves, with the parameters of 2·E half-size
    experts."""
    return {
        "layer": cartesian_moe,
        "select": TopK(top_k),
        "num_shared_experts": num_shared_experts,
        "balance": [partial(SwitchLoss, balance)],
    }


@checked
def multi_head_moe(
    hidden_size: int, intermediate_size: int, num_experts: int, *, heads: Size, **options: Any
) -> MultiHeadMoE:
    """MultiHeadMoE around an MoE of hidden_size / heads."""
    moe = MoE(hidden_size // heads, intermediate_size, num_experts, **options)
    return MultiHeadMoE(moe, hidden_size, heads, **_device(options))


@preset(
    "structure",
    28,
    "MH-MoE: Multi-Head Mixture-of-Experts, arXiv:2411.16205",
    f"{PAPER}; 4 heads: of the paper before it, arXiv:2404.15045",
    unverified="balance",
)
def multi_head(*, heads: int = 4, top_k: int = 2, balance: float = 1e-2) -> Options:
    """Routes each piece of a token separately.

    The caller adapts intermediate_size and num_experts to equal FLOPs and parameters; see layers.MultiHeadMoE. The
    paper has 2 heads with top_k = 2 and 40 experts, or 3 with 3 and 96; 4 heads are those of the paper before
    (arXiv:2404.15045).
    """
    return {
        "layer": multi_head_moe,
        "heads": heads,
        "select": TopK(top_k),
        "balance": [partial(SwitchLoss, balance)],
    }


def stratified_moe(
    hidden_size: int, intermediate_size: int, num_experts: int, *, strata: Sequence[int] | None = None, **options: Any
) -> StratifiedMoE:
    """StratifiedMoE; the default strata are a quarter, a quarter and a half of the experts."""
    if strata is None:
        strata = [num_experts // 4, num_experts // 4, num_experts - 2 * (num_experts // 4)]
    if sum(strata) != num_experts:
        raise ValueError(f"strata: expected {num_experts} experts in all, got {list(strata)}")
    return StratifiedMoE(hidden_size, intermediate_size, strata, **options)


@preset(
    "structure",
    29,
    "Towards Being Parameter-Efficient: A Stratified Sparsely Activated Transformer with Dynamic "
    "Capacity, arXiv:2305.02176",
    f"{PAPER}; its code normalises the two weights, norms the block's output too, adds residuals after the norm, "
    "and divides the loss by the gates that tokens visit",
    unverified="capacity in evaluation, which choices it keeps",
)
def stratified(*, strata: Sequence[int] | None = None, top_k: int = 2, balance: float = 1e-2) -> Options:
    """Strata of experts: a token that an early stratum keeps passes the next gate too, so hard tokens get more experts.

    The layer includes norm and residual. Experts accept at most top_k · T_i / E_i of the T_i tokens at a gate that sees
    E_i experts, in evaluation too, so sequences of a batch compete; with Capacity(…, scope="sequence") they do not. The
    default strata (E/4, E/4, E/2) are the paper's for 16 experts; its best are (2, 2, 2, 2) and (4, 12). The authors'
    code divides the two weights by their sum (normalize=True), and differs in norms and residuals.
    """
    return {
        "layer": stratified_moe,
        "strata": strata,
        "top_k": top_k,
        "aux_loss": balance,
        "capacity": Capacity(1.0, drop="choice"),
        "activation": "relu",
        "gated": False,
    }


def monet_layer(hidden_size: int, intermediate_size: int, num_experts: int, **options: Any) -> Monet:
    """Monet: num_experts must be a square n²; intermediate_size is the width of one expert."""
    root = math.isqrt(num_experts)
    if root * root != num_experts:
        raise ValueError(f"num_experts: expected a square, got {num_experts}")
    return Monet(hidden_size, root, intermediate_size, **options)


@preset(
    "structure",
    30,
    "Monet: Mixture of Monosemantic Experts for Transformers, arXiv:2412.04139",
    f"{PAPER} and of its code, without auxiliary losses",
    example=Example((64, 8, 64**2)),
)
def monet(*, heads: int = 8, top_k: int = 32, mode: Mode = "vertical") -> Options:
    """n² experts from 2·n halves: parameters and work grow with n.

    The paper has 512² experts of width 8, and one router per four layers: pass another layer's as Monet(router=).
    """
    return {"layer": monet_layer, "heads": heads, "top_k": top_k, "mode": mode}


def soft_layer(
    hidden_size: int, intermediate_size: int, num_experts: int, *, slots: int, normalize: bool, **options: Any
) -> SoftMoE:
    """SoftMoE of Experts."""
    experts = Experts(hidden_size, intermediate_size, num_experts, **options)
    return SoftMoE(experts, slots=slots, normalize=normalize, **_device(options))


@preset(
    "structure",
    31,
    "Don't flatten, tokenize! Unlocking the key to SoftMoE's efficacy in deep RL, arXiv:2410.01930",
    f"{PAPER} and of its code, whose slots are ⌈T / E⌉",
)
def soft_moe(*, slots: int = 1, normalize: bool = False) -> Options:
    """Experts process mixtures of the tokens of a sequence, and tokens get mixtures of their outputs.

    layers.per_conv_tokens makes one token per position of a feature map; the paper finds that this is what matters. Its
    code has slots = ⌈T / E⌉ for feature maps of T tokens. normalize: of the logits, as in the code of Soft MoE for
    images (arXiv:2308.00951).
    """
    return {"layer": soft_layer, "slots": slots, "normalize": normalize}


def merged_experts(
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    *,
    top_k: int,
    pooling: Literal["mean", "attention"],
    per_linear: bool = False,
    bottleneck: int = 0,
    noise: bool = False,
    balance: Sequence[Any] = (),
    **options: Any,
) -> MergedExperts:
    """MergedExperts of Experts and a Router, or one for each projection."""
    score: Any = partial(Linear, noise=True) if noise else None

    def router(width: int) -> Router:
        more = _device(options)
        return Router(width, num_experts, top_k, normalize=True, score=score, balance=balance, **more)

    experts = Experts(hidden_size, intermediate_size, num_experts, **options)
    down_router = router(intermediate_size) if per_linear else None
    return MergedExperts(router(hidden_size), experts, down_router=down_router, pooling=pooling, bottleneck=bottleneck)


@preset(
    "structure",
    49,
    "Merging Experts into One: Improving Computational Efficiency of Mixture of Experts, arXiv:2310.09832",
    f"{PAPER}; other options: of its code; pooling: {OURS}",
)
def merged(
    *,
    top_k: int = 2,
    pooling: Literal["mean", "attention"] = "mean",
    per_linear: bool = False,
    bottleneck: int = 0,
    noise: bool = False,
    importance: float = 0.0,
) -> Options:
    """Averages the weights of a sequence's experts once, and runs one expert.

    The weights are a softmax over the chosen logits. Options of the authors' code: per_linear, a router for each
    projection; noise, learned, of the logits; importance, the coefficient (1e-2 there) of a CV² loss of the experts'
    weights and, with noise, of their smooth load; its variance is E / (E - 1) times ours. At token level it has a
    bottleneck of the width H / 64 added to x. pooling = "attention" is ours.
    """
    losses = [ImportanceLoad(importance, importance if noise else 0.0)] if importance else []
    options = {"per_linear": per_linear, "bottleneck": bottleneck, "noise": noise, "balance": losses}
    return {
        "layer": merged_experts,
        "top_k": top_k,
        "pooling": pooling,
        **{name: value for name, value in options.items() if value},
    }


@checked
def stitched(
    hidden_size: int, intermediate_size: int, num_experts: int, *, depth: Size = 2, **options: Any
) -> Stitched:
    """A hub and num_experts experts of `depth` feed-forward networks each, joined by stitch layers."""

    def blocks() -> list[nn.Module]:
        return [SharedExperts(hidden_size, intermediate_size, **options) for _ in range(depth)]

    return Stitched(hidden_size, blocks(), [blocks() for _ in range(num_experts)], **_device(options))


@preset(
    "structure",
    85,
    "BTS: Harmonizing Specialized Experts into a Generalist LLM, arXiv:2502.00075",
    f"formula of a reimplementation, not read in the paper; a gate for each network rather than each feature, and "
    f"networks of feed-forward layers: {OURS}",
    unverified="the initial values, depth",
)
def branch_train_stitch(*, depth: int = 2) -> Options:
    """A hub and experts that are networks of their own, joined by gated linear maps, into the experts and into the hub
    in turn. There is no choice of experts: all run.

    The paper joins language models, of which only the maps are trained: put layers.StitchLayer between their blocks.
    """
    return {"layer": stitched, "depth": depth}
