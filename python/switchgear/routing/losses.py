# SPDX-License-Identifier: BSD-3-Clause
"""The losses of balance.py as options of a router: small objects with a coefficient, called with (routing, context).

    switchgear.MoE(256, 128, 16, 2, balance=[SwitchLoss(1e-2), ZLoss(1e-3)])

A router calls them in training; the trainer adds the sum of moe.losses to its loss. `name` is the key there. Any
function (routing, context) -> scalar works too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.functional import Routing, as_number
from switchgear.reference import check_choice, check_finite, check_range, check_size, wide
from switchgear.routing import balance
from switchgear.routing.balance import count_tokens, router_probabilities, sum_over_processes
from switchgear.routing.context import Context, check_positive, groups_of, is_recomputing, made, sequences
from switchgear.routing.counting import aside
from switchgear.routing.ranking import is_open
from switchgear.utils.modules import FillsBuffers, KeepsFloat32

if TYPE_CHECKING:
    from switchgear.routing.controllers import AdaptiveCoefficient

BALANCE_SCOPES = ("micro", "sequence", "global")
_MOST_CALLS = 1024  # whose counts are kept for recomputations; more micro-batches never wait for their backward


def _no_calls() -> deque[tuple[Tensor, Tensor]]:
    """For the last calls of a step: the sum of the probabilities, and the counts by then."""
    return deque(maxlen=_MOST_CALLS)


def _check_numbers(**numbers: float) -> None:
    for name, number in numbers.items():
        check_finite(name, as_number(name, number))


class SwitchLoss(nn.Module):
    """coefficient · E · Σ_e f_e · P_e (Switch Transformer, arXiv:2101.03961).

    Args:
        coefficient: α; an AdaptiveCoefficient (or a partial that makes one) follows the fraction of dropped tokens
            (arXiv:2406.06563).
        scope: the tokens over which f_e, the fraction of tokens that chose expert e, is counted. "micro": those of the
            call. "sequence": per sequence, with the losses averaged (DeepSeek-V3, arXiv:2412.19437). "global": those of
            all processes of Context.group, or of the default group if there is one (arXiv:2501.11873). P_e, which
            carries the gradient, is always the mean probability of the call's (or sequence's) tokens.
        accumulate: with scope "global", also count over all calls since the last Router.after_step, that is over the
            micro-batches of a step. The calls that torch.func.vmap makes at once count as one.
        per_choice: divide by the mean number of choices of a token, so that an even load gives α for any K
            (DeepSeekMoE, arXiv:2401.06066, equation 12). It is counted over the tokens of f_e; empty choices are none.
        score_function: see router_probabilities.
        num_null: the last num_null experts are null experts and share one load (AdaMoE, arXiv:2406.13233).

    Counts are taken before any capacity limit. Even load: α times that mean number, or α with per_choice.
    """

    counted = ("_counts", "_calls")

    def __init__(
        self,
        coefficient: float | AdaptiveCoefficient | Callable[[], AdaptiveCoefficient] = 1e-2,
        scope: str = "micro",
        *,
        accumulate: bool = False,
        per_choice: bool = False,
        score_function: str | None = None,
        num_null: int = 0,
        name: str = "switch",
    ) -> None:
        super().__init__()
        check_choice("scope", scope, BALANCE_SCOPES)
        if accumulate and scope != "global":
            raise ValueError(f"accumulate: expected scope 'global' with it, got {scope!r}")
        check_size("num_null", num_null, 0)
        self.coefficient = made(coefficient)
        if not isinstance(self.coefficient, nn.Module):
            _check_numbers(coefficient=self.coefficient)
        self.scope, self.accumulate, self.per_choice = scope, accumulate, per_choice
        self.score_function, self.num_null, self.name = score_function, num_null, name
        self._counts: Tensor | None = None  # [E+1]: tokens per expert, then tokens; since the last step
        self._calls = _no_calls()

    def forward(self, routing: Routing, context: Context) -> Tensor:
        probabilities = router_probabilities(routing, self.score_function)
        num_tokens = probabilities.shape[0]
        if self.scope == "sequence":
            ids, num_sequences = sequences(context, num_tokens, probabilities.device)
            loss = balance.sequence_switch_loss(probabilities, routing.topk_ids, ids, num_sequences, self.per_choice)
        else:
            counts = count_tokens(routing.topk_ids, routing.num_experts)
            counts = torch.cat((counts, counts.new_full((1,), num_tokens)))
            if self.scope == "global":
                counts = self._gathered(counts, probabilities, context.group)
            of = counts[:-1].sum() if self.per_choice else counts[-1]
            loss = balance.null_aware_switch_loss(probabilities, counts[:-1], of, self.num_null)
        coefficient: Any = self.coefficient
        weighted: Tensor = loss * (coefficient(routing) if isinstance(coefficient, nn.Module) else coefficient)
        return weighted

    @property
    def has_counts(self) -> bool:
        """Whether calls since the last step are counted."""
        return self._counts is not None

    def _gathered(self, counts: Tensor, probabilities: Tensor, group: Any) -> Tensor:
        """The counts over processes and, with accumulate, over the step."""
        if not self.accumulate:
            return sum_over_processes(counts, group)
        total: Tensor = aside(partial(self._accumulated, group), counts, probabilities)
        return total

    def _accumulated(self, group: Any, counts: Tensor, probabilities: Tensor) -> Tensor:
        """The probabilities [T,E], summed over the tokens, tell which call a recomputation repeats."""
        sums = probabilities.detach().flatten(0, -2).sum(0)
        if self._counts is not None and is_recomputing():
            return self._repeated(sums)
        counts = sum_over_processes(counts.view(-1, counts.shape[-1]).sum(0), group)
        counts = counts if self._counts is None else counts + self._counts
        self._counts = counts
        if not torch.compiler.is_compiling():  # whose graphs would depend on the number of calls
            self._calls.append((sums, counts))
        return counts

    def _repeated(self, probabilities: Tensor) -> Tensor:
        """The counts that the repeated call saw: later micro-batches may have been counted since. Its probabilities are
        the nearest ones, as a recomputation may round differently."""
        if not self._calls:
            assert self._counts is not None
            return self._counts
        sums, counts = (torch.stack(part) for part in zip(*self._calls, strict=True))
        nearest = (sums - probabilities).abs().sum(1).argmin(keepdim=True)
        return counts.index_select(0, nearest)[0]  # unlike an index, not read by the host

    def after_step(self, tokens_per_expert: Tensor, router: nn.Module) -> None:
        """Resets the counts of the step."""
        self._counts, self._calls = None, _no_calls()
        coefficient: Any = self.coefficient
        if isinstance(coefficient, nn.Module):
            coefficient.after_step(tokens_per_expert, router)  # type: ignore[operator]

    def extra_repr(self) -> str:
        parts = [] if isinstance(self.coefficient, nn.Module) else [str(self.coefficient)]
        parts += [f"scope={self.scope!r}", *(name for name in ("per_choice", "accumulate") if getattr(self, name))]
        return ", ".join(parts)


class NullAwareSwitchLoss(SwitchLoss):
    """SwitchLoss over real experts and, last, `num_null` null experts that share one load (AdaMoE, arXiv:2406.13233).

    The default 1e-4 is the coefficient of the published Mixtral configuration.
    """

    def __init__(self, coefficient: float = 1e-4, *, num_null: int, **options: Any) -> None:
        super().__init__(coefficient, num_null=num_null, **options)


@dataclass(frozen=True)
class ZLoss:
    """coefficient · mean_t (log Σ_e exp z_te)², of the logits (ST-MoE, arXiv:2202.08906; OpenMoE, arXiv:2402.01739)."""

    coefficient: float = 1e-3
    name: ClassVar[str] = "z"

    def __post_init__(self) -> None:
        _check_numbers(coefficient=self.coefficient)

    def __call__(self, routing: Routing, context: Context) -> Tensor:
        return self.coefficient * balance.z_loss(routing.router_logits)


@dataclass(frozen=True)
class ImportanceLoad:
    """importance · CV²(total weights) + load · CV²(smooth load) (arXiv:1701.06538; LLaMA-MoE, arXiv:2406.16554).

    CV² has the variance of the population, a mean over E; the code of LLaMA-MoE divides by E - 1.

    noise_std: the noise of the smooth load, in units of logits. A score Linear(noise=True) has one of its own: then it
    is that, and the load follows the logits without noise. Each token has as many places as it made choices.
    """

    importance: float = 1e-2
    load: float = 1e-2
    noise_std: float = 1.0
    name: ClassVar[str] = "importance_load"

    def __post_init__(self) -> None:
        _check_numbers(importance=self.importance, load=self.load, noise_std=self.noise_std)
        check_positive("noise_std", self.noise_std)

    def __call__(self, routing: Routing, context: Context) -> Tensor:
        ids = routing.topk_ids
        loss = self.importance * balance.importance_loss(ids, routing.topk_weights, routing.num_experts)
        logits, chosen = routing.router_logits, (ids >= 0).sum(1)
        noise = context.noise[0] if context.noise is not None and len(context.noise) == 1 else None
        if noise is not None and noise.noisy_logits.shape == logits.shape:
            closed = ~is_open(logits)
            clean, noisy = (z.masked_fill(closed, torch.finfo(z.dtype).min) for z in noise[:2])
            smooth = balance.smooth_load(noisy, chosen, noise.deviation, clean)
        else:
            smooth = balance.smooth_load(logits, chosen, self.noise_std)
        return loss + self.load * balance.squared_variation(smooth)


@dataclass(frozen=True)
class EntropyLoss:
    """coefficient · mean_t H(p_t): makes routers with a variable number of experts per token choose few
    (arXiv:2403.07652)."""

    coefficient: float = 1e-4
    score_function: str | None = None
    name: ClassVar[str] = "entropy"

    def __post_init__(self) -> None:
        _check_numbers(coefficient=self.coefficient)

    def __call__(self, routing: Routing, context: Context) -> Tensor:
        return self.coefficient * balance.entropy_loss(router_probabilities(routing, self.score_function))


@dataclass(frozen=True)
class BatchEntropy:
    """-coefficient · H(mean_t softmax(z_t)): spreads the batch over the experts (sigma-MoE, arXiv:2310.10837).

    The softmax is always of the logits, whatever the score function.
    """

    coefficient: float = 1e-3
    score_function: str | None = "softmax"
    name: ClassVar[str] = "batch_entropy"

    def __post_init__(self) -> None:
        _check_numbers(coefficient=self.coefficient)

    def __call__(self, routing: Routing, context: Context) -> Tensor:
        return self.coefficient * balance.batch_entropy_loss(router_probabilities(routing, self.score_function))


@dataclass(frozen=True)
class ChoiceLoss:
    """coefficient · mean binary cross-entropy between the sigmoid of a logit and whether it was chosen: chosen tokens
    then have positive logits, the others negative ones (the auxiliary loss of Mixture-of-Depths, arXiv:2404.02258)."""

    coefficient: float = 1e-2
    name: ClassVar[str] = "choice"

    def __post_init__(self) -> None:
        _check_numbers(coefficient=self.coefficient)

    def __call__(self, routing: Routing, context: Context) -> Tensor:
        logits = wide(routing.router_logits)
        chosen = balance.times_chosen(routing.topk_ids, logits)
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

    def __init__(self, vector: Sequence[Any] | Tensor, coefficient: float, score_function: str | None) -> None:
        super().__init__()
        _check_numbers(coefficient=coefficient)
        self._given = torch.as_tensor(vector, device="cpu").detach()
        self.register_buffer("vector", self._given.to(torch.get_default_device(), copy=True), persistent=False)
        self.coefficient, self.score_function = coefficient, score_function

    def reset_parameters(self) -> None:
        """Restores the given vector."""
        self.fill_buffers(self.vector.device)

    def fill_buffers(self, device: torch.device) -> None:
        """Copies the given vector."""
        self.vector = self._given.to(device, copy=True)

    def _prepare(self, routing: Routing) -> None:
        if self.vector.shape != (routing.num_experts,):
            raise ValueError(f"{self.name}: expected {routing.num_experts} experts, got {self.vector.numel()}")
        self.fill_on(routing.router_logits.device)

    def _probabilities(self, routing: Routing) -> Tensor:
        self._prepare(routing)
        return router_probabilities(routing, self.score_function)


class ParamPenalty(_PerExpert):
    """coefficient · E · Σ_e M_e · P_e, M_e: fraction of tokens on expert e times its width (HMoE, arXiv:2408.10681).

    widths [E]: intermediate sizes in any unit; a common factor acts like the coefficient.
    """

    name = "parameters"

    def __init__(
        self, widths: Sequence[float] | Tensor, coefficient: float = 1e-2, score_function: str | None = None
    ) -> None:
        super().__init__(torch.as_tensor(widths, dtype=torch.float32, device="cpu"), coefficient, score_function)

    def forward(self, routing: Routing, context: Context) -> Tensor:
        probabilities = self._probabilities(routing)
        return self.coefficient * balance.parameter_penalty(probabilities, routing.topk_ids, self.vector)


class DeviceBalance(_PerExpert):
    """coefficient · Σ_g f'_g · P'_g over groups of experts, one per device (DeepSeekMoE, arXiv:2401.06066).

    groups: the device of each expert [E], from 0; or the number of devices, with equally many consecutive experts each.
    coefficient: the 145B model uses 0.05. num_experts: E, if groups is a number.
    """

    name = "device"

    def __init__(
        self,
        groups: int | Sequence[int] | Tensor,
        coefficient: float = 0.05,
        score_function: str | None = None,
        num_experts: int | None = None,
    ) -> None:
        super().__init__(_sums_of(groups, num_experts), coefficient, score_function)

    def forward(self, routing: Routing, context: Context) -> Tensor:
        return self.coefficient * balance.device_loss(self._probabilities(routing), routing.topk_ids, self.vector)


class AlignmentLoss(DeviceBalance):
    """coefficient · the excess of experts in other groups over the least chosen expert (SAM, arXiv:2110.07431; see
    alignment_loss). Arguments as for DeviceBalance; the coefficient is unverified."""

    name = "alignment"

    def forward(self, routing: Routing, context: Context) -> Tensor:
        return self.coefficient * balance.alignment_loss(self._probabilities(routing), routing.topk_ids, self.vector)


class LocalityLoss(_PerExpert):
    """coefficient · -log(mean probability of this node's experts) (LocMoE, arXiv:2401.13920; see locality_loss).

    placement: the node of each expert [E]; or the number of nodes, with equally many consecutive experts each. node:
    this process's node. coefficient: the paper's μ (unverified). num_experts: E, if placement is a number.
    """

    name = "locality"

    def __init__(
        self,
        placement: int | Sequence[int] | Tensor,
        node: int,
        coefficient: float = 1e-2,
        score_function: str | None = None,
        num_experts: int | None = None,
    ) -> None:
        super().__init__(groups_of(placement, num_experts, "placement") == node, coefficient, score_function)

    def forward(self, routing: Routing, context: Context) -> Tensor:
        return self.coefficient * balance.locality_loss(self._probabilities(routing), self.vector)


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
        coefficient: float = 1.0,
        score_function: str | None = None,
        num_experts: int | None = None,
    ) -> None:
        super().__init__(_sums_of(groups, num_experts), coefficient, score_function)

    def forward(self, routing: Routing, context: Context) -> Tensor:
        probabilities, counted = self._probabilities(routing), is_open(routing.router_logits)
        return self.coefficient * balance.cluster_variance_loss(probabilities, self.vector, counted)


class LocalizedBalance(_PerExpert):
    """coefficient · var(Z) / mean(Z), where Z is the weight per expert and sequence, increased if their types agree
    (LoRAMoE, arXiv:2312.09979).

    expert_types [E]. Context.embedding holds the types of the sequences: integers [B]. delta, coefficient: 0.1
    (unverified).
    """

    name = "localized"

    def __init__(self, expert_types: Sequence[int] | Tensor, delta: float = 0.1, coefficient: float = 0.1) -> None:
        super().__init__(expert_types, coefficient, None)
        _check_numbers(delta=delta)
        self.delta = delta

    def forward(self, routing: Routing, context: Context) -> Tensor:
        self._prepare(routing)
        types = context.require("embedding", "LocalizedBalance").reshape(-1)
        ids, num_sequences = sequences(context, routing.topk_ids.shape[0], routing.topk_ids.device)
        if len(types) != num_sequences and len(ids):
            raise ValueError(f"embedding: expected a type for each of {num_sequences} sequences, got {len(types)}")
        choice = routing.topk_ids, routing.topk_weights
        loss = balance.localized_balance_loss(*choice, self.vector, types, ids, self.delta)
        return self.coefficient * loss
