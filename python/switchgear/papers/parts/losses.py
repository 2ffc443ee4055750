# SPDX-License-Identifier: BSD-3-Clause
"""Losses of single papers, as functions of tensors and as options of a router."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from switchgear.checks import Finite, checked
from switchgear.functional import Routing
from switchgear.reference import check_range, weight_dtype, wide
from switchgear.routing.balance import (
    TINY,
    count_tokens,
    mean_probabilities,
    router_probabilities,
    switch_loss,
    times_chosen,
    total_weights,
)
from switchgear.routing.context import Context, groups_of, sequences
from switchgear.routing.losses import SwitchLoss
from switchgear.routing.ranking import is_open
from switchgear.utils.modules import FillsBuffers, KeepsFloat32


def device_loss(probabilities: Tensor, topk_ids: Tensor, groups: Tensor) -> Tensor:
    """Σ_g f'_g · P'_g over groups of experts, one per device (DeepSeekMoE, arXiv:2401.06066).

    f'_g is the mean over the group's experts of f_e = E · tokens_per_expert[e] / the number of choices (K·T without
    empty ones); P'_g is the sum of their mean probabilities. probabilities [T,E], topk_ids [T,K], groups [E]: the group
    of each expert. 1 for an even load.
    """
    probabilities = wide(probabilities)
    num_experts = probabilities.shape[1]
    counts = count_tokens(topk_ids, num_experts).to(probabilities.dtype)
    fraction = counts * num_experts / counts.sum().clamp(min=1)
    groups = groups.long()
    sums = torch.stack((fraction, mean_probabilities(probabilities), torch.ones_like(fraction)))
    fraction, mass, size = torch.zeros_like(sums).index_add(1, groups, sums)  # there are at most E groups
    loss: Tensor = (fraction / size.clamp(min=1) * mass).sum()
    return loss


def alignment_loss(probabilities: Tensor, topk_ids: Tensor, groups: Tensor) -> Tensor:
    """By how much experts of other groups exceed the least chosen one: mean_t Σ_e max(0, p_te - p_t,least), over the
    experts e of groups that token t does not use. 0 if the choice among all experts is that inside the groups.

    SAM, arXiv:2110.07431, aligns its two routers by such a term; this form of it is unverified. probabilities [T,E],
    topk_ids [T,K], groups [E]: the group of each expert.
    """
    probabilities = wide(probabilities)
    is_chosen, ids, groups = topk_ids >= 0, topk_ids.clamp(min=0).long(), groups.long()
    least = probabilities.gather(1, ids).masked_fill(~is_chosen, math.inf).amin(1, keepdim=True)
    uses = torch.zeros_like(probabilities).scatter_add(1, groups[ids], is_chosen.to(probabilities.dtype))
    excess = (probabilities - least).clamp(min=0) * (uses.gather(1, groups.expand_as(probabilities)) == 0)
    loss: Tensor = excess.sum() / max(len(topk_ids), 1)
    return loss


def parameter_penalty(probabilities: Tensor, topk_ids: Tensor, widths: Tensor) -> Tensor:
    """E · Σ_e M_e · P_e, with M_e = widths[e] · the fraction of tokens that chose e (HMoE, arXiv:2408.10681).

    It penalises wide experts by their cost. probabilities [T,E], topk_ids [T,K], widths [E] in any unit.
    """
    load = count_tokens(topk_ids, probabilities.shape[1]) * widths.to(weight_dtype(probabilities.dtype))
    return switch_loss(probabilities, load, probabilities.shape[0])


def entropy_loss(probabilities: Tensor) -> Tensor:
    """mean_t -Σ_e p log p: low if each token's distribution is peaked (arXiv:2403.07652)."""
    return _entropy(wide(probabilities)).sum() / max(len(probabilities), 1)


def batch_entropy_loss(probabilities: Tensor) -> Tensor:
    """-H(mean_t p): low if the batch uses all experts equally (sigma-MoE, arXiv:2310.10837)."""
    return -_entropy(mean_probabilities(wide(probabilities)))


def locality_loss(probabilities: Tensor, is_local: Tensor) -> Tensor:
    """-log of the mean probability of local experts: 0 if every token stays local (LocMoE, arXiv:2401.13920).

    Let D be the mean of probabilities [T,E], and D_local its part on this node's experts (is_local [E] bool),
    normalised. This is KL(D_local || D). The paper writes the reverse divergence, which is infinite as soon as one
    token leaves the node. 0 without tokens.
    """
    share = (mean_probabilities(wide(probabilities)) * is_local).sum()
    return -share.clamp(min=TINY).log() * float(len(probabilities) > 0)


def cluster_variance_loss(probabilities: Tensor, groups: Tensor, is_open: Tensor | None = None) -> Tensor:
    """E · the mean over clusters of the variance of P_e over the experts e of a cluster, with P_e the mean of
    probabilities [T,E] over tokens: 0 if the experts of each cluster are equally likely in the batch, however sure the
    router is of a token (the code of MoEC, arXiv:2207.09094, with coef-type 1).

    Variances divide by n - 1; those of single experts are 0. The code has sums over tokens instead of means: its
    variance is T² times this one, beside a balance loss that is T times ours.

    groups [E]: the cluster of each expert. is_open, broadcastable to [T,E]: experts that are closed for all tokens do
    not count; all count if None.
    """
    groups, mean = groups.long(), mean_probabilities(wide(probabilities))
    counted = torch.ones_like(mean)
    if is_open is not None:
        counted = is_open.expand_as(probabilities).any(0).to(mean.dtype)
    zeros = torch.zeros_like(mean)  # there are at most E clusters
    size = zeros.index_add(0, groups, counted)
    center = zeros.index_add(0, groups, mean * counted) / size.clamp(min=1)
    squares = zeros.index_add(0, groups, (mean - center.index_select(0, groups)).square() * counted)
    loss: Tensor = (squares / (size - 1).clamp(min=1)).sum() / (size > 0).sum().clamp(min=1)
    return len(mean) * loss


def localized_balance_loss(
    topk_ids: Tensor,
    topk_weights: Tensor,
    expert_types: Tensor,
    sequence_types: Tensor,
    sequence_ids: Tensor,
    delta: float = 0.1,
) -> Tensor:
    """var(Z) / mean(Z) of Z[e,s] = I[e,s] · Q[e,s] (LoRAMoE, arXiv:2312.09979).

    Q is the weight that the tokens of sequence s give to expert e; I is 1 + delta if the types of expert and sequence
    agree, else 1 - delta. (The published code divides the unbiased variance by mean².) 0 without tokens.

    Args: topk_ids, topk_weights [T,K]; expert_types [E]; sequence_types [B]; sequence_ids [T] in [0, B). delta
    unverified.
    """
    num_experts, num_sequences = len(expert_types), len(sequence_types)
    cells = sequence_ids.long()[:, None] * (num_experts + 1) + topk_ids.long() + 1
    weight = total_weights(cells, topk_weights, num_sequences * (num_experts + 1))
    weight = weight.view(num_sequences, num_experts + 1)[:, 1:]
    agrees = (sequence_types[:, None] == expert_types).to(weight.dtype)
    z = weight * (1 + delta * (2 * agrees - 1))
    count = max(z.numel(), 1)
    mean = z.sum() / count
    return ((z - mean).square().sum() / count / mean.clamp(min=TINY)).to(weight_dtype(topk_weights.dtype))


def _entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp(min=TINY).log()).sum(-1)  # keeps the gradient finite at 0


class NullAwareSwitchLoss(SwitchLoss):
    """SwitchLoss over real experts and, last, `num_null` null experts that share one load (AdaMoE, arXiv:2406.13233).

    The default 1e-4 is the coefficient of the published Mixtral configuration.
    """

    def __init__(self, coefficient: float = 1e-4, *, num_null: int, **options: Any) -> None:
        super().__init__(coefficient, num_null=num_null, **options)


@checked
@dataclass(frozen=True)
class EntropyLoss:
    """coefficient · mean_t H(p_t): makes routers with a variable number of experts per token choose few
    (arXiv:2403.07652)."""

    coefficient: Finite = 1e-4
    score_function: str | None = None
    name: ClassVar[str] = "entropy"

    def __call__(self, routing: Routing, context: Context) -> Tensor:
        return self.coefficient * entropy_loss(router_probabilities(routing, self.score_function))


@checked
@dataclass(frozen=True)
class BatchEntropy:
    """-coefficient · H(mean_t softmax(z_t)): spreads the batch over the experts (sigma-MoE, arXiv:2310.10837).

    The softmax is always of the logits, whatever the score function.
    """

    coefficient: Finite = 1e-3
    score_function: str | None = "softmax"
    name: ClassVar[str] = "batch_entropy"

    def __call__(self, routing: Routing, context: Context) -> Tensor:
        return self.coefficient * batch_entropy_loss(router_probabilities(routing, self.score_function))


@checked
@dataclass(frozen=True)
class ChoiceLoss:
    """coefficient · mean binary cross-entropy between the sigmoid of a logit and whether it was chosen: chosen tokens
    then have positive logits, the others negative ones (the auxiliary loss of Mixture-of-Depths, arXiv:2404.02258)."""

    coefficient: Finite = 1e-2
    name: ClassVar[str] = "choice"

    def __call__(self, routing: Routing, context: Context) -> Tensor:
        logits = wide(routing.router_logits)
        chosen = times_chosen(routing.topk_ids, logits)
        loss = F.binary_cross_entropy_with_logits(logits, chosen, reduction="sum")
        return self.coefficient * loss / max(logits.numel(), 1)


def _sums_of(groups: int | Sequence[int] | Tensor, num_experts: int | None) -> Tensor:
    """groups_of, for sums by group in a tensor [E]."""
    found = groups_of(groups, num_experts)
    check_range("groups", found, 0, len(found))
    return found


class _PerExpert(FillsBuffers, KeepsFloat32):
    """A loss with a fixed vector over the experts, which follows the router to its device."""

    vector: Tensor

    @checked
    def __init__(self, vector: Any, coefficient: Finite, score_function: str | None) -> None:
        super().__init__()
        self._given = torch.as_tensor(vector, device="cpu").detach()
        self.register_buffer("vector", self._given.to(torch.get_default_device(), copy=True), persistent=False)
        self.coefficient, self.score_function = coefficient, score_function

    def reset_parameters(self) -> None:
        """Restores the given vector."""
        self.fill_buffers(self.vector.device)

    def fill_buffers(self, device: torch.device) -> None:
        """Copies the given vector."""
        self.vector = self._given.to(device, copy=True)

    @staticmethod
    def _loss(probabilities: Tensor, topk_ids: Tensor, vector: Tensor, /) -> Tensor:
        raise NotImplementedError

    def _prepare(self, routing: Routing) -> None:
        if self.vector.shape != (routing.num_experts,):
            raise ValueError(f"{self.name}: expected {routing.num_experts} experts, got {self.vector.numel()}")
        self.fill_on(routing.router_logits.device)

    def forward(self, routing: Routing, context: Context) -> Tensor:
        self._prepare(routing)
        probabilities = router_probabilities(routing, self.score_function)
        return self.coefficient * self._loss(probabilities, routing.topk_ids, self.vector)


class ParamPenalty(_PerExpert):
    """coefficient · E · Σ_e M_e · P_e, M_e: fraction of tokens on expert e times its width (HMoE, arXiv:2408.10681).

    widths [E]: intermediate sizes in any unit; a common factor acts like the coefficient.
    """

    name = "parameters"
    _loss = staticmethod(parameter_penalty)

    def __init__(
        self, widths: Sequence[float] | Tensor, coefficient: float = 1e-2, score_function: str | None = None
    ) -> None:
        super().__init__(torch.as_tensor(widths, dtype=torch.float32, device="cpu"), coefficient, score_function)


class DeviceBalance(_PerExpert):
    """coefficient · Σ_g f'_g · P'_g over groups of experts, one per device (DeepSeekMoE, arXiv:2401.06066).

    groups: the device of each expert [E], from 0; or the number of devices, with equally many consecutive experts each.
    coefficient: the 145B model uses 0.05. num_experts: E, if groups is a number.
    """

    name = "device"
    _loss = staticmethod(device_loss)

    def __init__(
        self,
        groups: int | Sequence[int] | Tensor,
        coefficient: Finite = 0.05,
        score_function: str | None = None,
        num_experts: int | None = None,
    ) -> None:
        super().__init__(_sums_of(groups, num_experts), coefficient, score_function)


class AlignmentLoss(DeviceBalance):
    """coefficient · the excess of experts in other groups over the least chosen expert (SAM, arXiv:2110.07431; see
    alignment_loss). Arguments as for DeviceBalance; the coefficient is unverified."""

    name = "alignment"
    _loss = staticmethod(alignment_loss)


class LocalityLoss(_PerExpert):
    """coefficient · -log(mean probability of this node's experts) (LocMoE, arXiv:2401.13920; see locality_loss).

    placement: the node of each expert [E]; or the number of nodes, with equally many consecutive experts each. node:
    this process's node. coefficient: the paper's μ (unverified). num_experts: E, if placement is a number.
    """

    name = "locality"
    _loss = staticmethod(lambda probabilities, _, is_local: locality_loss(probabilities, is_local))

    def __init__(
        self,
        placement: int | Sequence[int] | Tensor,
        node: int,
        coefficient: Finite = 1e-2,
        score_function: str | None = None,
        num_experts: int | None = None,
    ) -> None:
        super().__init__(groups_of(placement, num_experts, "placement") == node, coefficient, score_function)


class ClusterVariance(_PerExpert):
    """coefficient · E · the variance of mean probabilities within clusters (MoEC, arXiv:2207.09094; see
    cluster_variance_loss).

    groups: the cluster of each expert [E], from 0; or the number of equal clusters of consecutive experts.
    num_experts: E, if groups is a number. Experts that a mask closes for all tokens (ClusterDropout) do not count.
    """

    name = "clusters"

    def __init__(
        self,
        groups: int | Sequence[int] | Tensor,
        coefficient: Finite = 1.0,
        score_function: str | None = None,
        num_experts: int | None = None,
    ) -> None:
        super().__init__(_sums_of(groups, num_experts), coefficient, score_function)

    def forward(self, routing: Routing, context: Context) -> Tensor:
        self._prepare(routing)
        probabilities = router_probabilities(routing, self.score_function)
        return self.coefficient * cluster_variance_loss(probabilities, self.vector, is_open(routing.router_logits))


class LocalizedBalance(_PerExpert):
    """coefficient · var(Z) / mean(Z), where Z is the weight per expert and sequence, increased if their types agree
    (LoRAMoE, arXiv:2312.09979).

    expert_types [E]. Context.embedding holds the types of the sequences: integers [B]. delta, coefficient: 0.1
    (unverified).
    """

    name = "localized"

    @checked
    def __init__(self, expert_types: Sequence[int] | Tensor, delta: Finite = 0.1, coefficient: float = 0.1) -> None:
        super().__init__(expert_types, coefficient, None)
        self.delta = delta

    def forward(self, routing: Routing, context: Context) -> Tensor:
        self._prepare(routing)
        types = context.require("embedding", "LocalizedBalance").reshape(-1)
        ids, num_sequences = sequences(context, routing.topk_ids.shape[0], routing.topk_ids.device)
        if len(types) != num_sequences and len(ids):
            raise ValueError(f"embedding: expected a type for each of {num_sequences} sequences, got {len(types)}")
        choice = routing.topk_ids, routing.topk_weights
        loss = localized_balance_loss(*choice, self.vector, types, ids, self.delta)
        return self.coefficient * loss
