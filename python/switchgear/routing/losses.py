# SPDX-License-Identifier: BSD-3-Clause
"""The losses of balance.py as options of a router: small objects with a coefficient, called with (routing, context).

    switchgear.MoE(256, 128, 16, 2, balance=[SwitchLoss(1e-2), ZLoss(1e-3)])

A router calls them in training; the trainer adds the sum of moe.losses to its loss. `name` is the key there. Any
function (routing, context) -> scalar works too.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from switchgear.checks import Count, Finite, Positive, checked
from switchgear.functional import Routing
from switchgear.routing import balance
from switchgear.routing.balance import count_tokens, router_probabilities, sum_over_processes
from switchgear.routing.context import Context, is_recomputing, made, sequences
from switchgear.routing.counting import aside
from switchgear.routing.ranking import is_open

_MOST_CALLS = 1024  # whose counts are kept for recomputations; more micro-batches never wait for their backward


def _no_calls() -> deque[tuple[Tensor, Tensor]]:
    """For the last calls of a step: the sum of the probabilities, and the counts by then."""
    return deque(maxlen=_MOST_CALLS)


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

    @checked
    def __init__(
        self,
        coefficient: Finite | nn.Module | type[nn.Module] | partial[Any] = 1e-2,
        scope: Literal["micro", "sequence", "global"] = "micro",
        *,
        accumulate: bool = False,
        per_choice: bool = False,
        score_function: str | None = None,
        num_null: Count = 0,
        name: str = "switch",
    ) -> None:
        super().__init__()
        if accumulate and scope != "global":
            raise ValueError(f"accumulate: expected scope 'global' with it, got {scope!r}")
        self.coefficient = made(coefficient)
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


@checked
@dataclass(frozen=True)
class ZLoss:
    """coefficient · mean_t (log Σ_e exp z_te)², of the logits (ST-MoE, arXiv:2202.08906; OpenMoE, arXiv:2402.01739)."""

    coefficient: Finite = 1e-3
    name: ClassVar[str] = "z"

    def __call__(self, routing: Routing, context: Context) -> Tensor:
        return self.coefficient * balance.z_loss(routing.router_logits)


@checked
@dataclass(frozen=True)
class ImportanceLoad:
    """importance · CV²(total weights) + load · CV²(smooth load) (arXiv:1701.06538; LLaMA-MoE, arXiv:2406.16554).

    CV² has the variance of the population, a mean over E; the code of LLaMA-MoE divides by E - 1.

    noise_std: the noise of the smooth load, in units of logits. A score Linear(noise=True) has one of its own: then it
    is that, and the load follows the logits without noise. Each token has as many places as it made choices.
    """

    importance: Finite = 1e-2
    load: Finite = 1e-2
    noise_std: Positive = 1.0
    name: ClassVar[str] = "importance_load"

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


@checked
@dataclass(frozen=True)
class LossFreeBias:
    """Raises the selection bias of experts with too few tokens and lowers that of the others (arXiv:2408.15664).

    After a step with n_e tokens on expert e, bias_e += rate · sign(mean(n) - n_e), or with rule "proportional"
    rate · (mean(n) - n_e) / mean(n), so that the rate does not depend on the batch; the paper's variant does not
    divide. The bias affects the choice but not the weights; it has no gradient.

        moe = switchgear.MoE(256, 128, 16, 4, score_function="sigmoid", balance=[LossFreeBias(1e-3)])
        …; optimizer.step(); moe.gate.after_step()
    """

    rate: Finite = 1e-3
    rule: Literal["sign", "proportional"] = "sign"
    needs_selection_bias: ClassVar[bool] = True

    @torch.no_grad()
    def after_step(self, tokens_per_expert: Tensor, router: Any) -> None:
        """tokens_per_expert [E]: of the step, over all processes."""
        counts = tokens_per_expert.float()
        mean = counts.mean()
        error = mean - counts
        error = error.sign() if self.rule == "sign" else error / mean.clamp(min=torch.finfo(mean.dtype).tiny)
        router.e_score_correction_bias.add_(error, alpha=self.rate)
