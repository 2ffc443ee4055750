# SPDX-License-Identifier: BSD-3-Clause
"""Random selections: sampled top-k, SparseMixer, Gumbel softmax, random experts. Random numbers come from
Context.generator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from switchgear.checks import Count, Finite, Fraction, NotNegativeOrInf, PositiveOrInf, Size, checked
from switchgear.functional import Routing
from switchgear.functional.gradients import apply
from switchgear.routing.context import NOTHING_KNOWN, Context, sequences
from switchgear.routing.ranking import ScoreFunction, choose, draw, finite, gumbel, scores_of, uniform
from switchgear.routing.selection import Dense, take

Level = Literal["token", "sequence", "batch"]


def _draws_per_token(level: str, context: Context, num_tokens: int, device: torch.device) -> tuple[int, Tensor | None]:
    """The number of draws at a level, and the index of each token's draw (None: every token has its own)."""
    if level == "token":
        return num_tokens, None
    if level == "batch":
        return 1, torch.zeros(num_tokens, dtype=torch.int64, device=device)
    sequence, count = sequences(context, num_tokens, device)
    return count, sequence


@checked
@dataclass(frozen=True)
class SampledTopK:
    """With probability p_sample a token's top_k experts are drawn from the router's probabilities without replacement;
    otherwise they are the best ones (knowledge augmentation, arXiv:2502.12947: top_k = E - 1, p_sample = 0.05)."""

    top_k: Size
    p_sample: Fraction = 0.05
    score_function: ScoreFunction = "softmax"
    normalize: bool = False
    scale: Finite = 1.0

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        router_logits = router_logits.reshape(-1, router_logits.shape[-1])
        num_tokens, device = router_logits.shape[0], router_logits.device
        scores = scores_of(router_logits, self.score_function)
        softmax = self.score_function == "softmax"
        odds = finite(router_logits.detach() if softmax else scores.detach().log())
        values = odds if bias is None else scores.detach() + finite(bias)
        if self.p_sample:
            drawn = odds + gumbel(tuple(odds.shape), context, device)
            drawn = drawn if bias is None else drawn + bias
            values = torch.where(uniform((num_tokens, 1), context, device) < self.p_sample, drawn, values)
        ids = choose(values, self.top_k)
        return take(router_logits, scores, ids, normalize=self.normalize, scale=self.scale)


@checked
@dataclass(frozen=True)
class NoisyTopK:
    """The top_k best experts by logits plus, in training, uniform noise in [0, noise). The noise does not enter the
    weights. A small change of the router then changes the expected output only a little (Towards Understanding Mixture
    of Experts, arXiv:2208.02813: noise = 1, top_k = 1)."""

    top_k: Size = 1
    noise: NotNegativeOrInf = 1.0
    score_function: ScoreFunction = "softmax"
    normalize: bool = False
    scale: Finite = 1.0

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        router_logits = router_logits.reshape(-1, router_logits.shape[-1])
        scores = scores_of(router_logits, self.score_function)
        values = finite(router_logits.detach())
        if context.training:
            values = values + self.noise * uniform(tuple(values.shape), context, values.device)
        if bias is not None:
            values = scores_of(values, self.score_function) + finite(bias)
        ids = choose(values, self.top_k)
        return take(router_logits, scores, ids, normalize=self.normalize, scale=self.scale)


class _Multiplier(torch.autograd.Function):
    """w · factor; its gradient with respect to the logits is that of log p_i times (grad · w): see SparseMixer."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, probabilities: Tensor, chosen: Tensor, factor: Tensor) -> Tensor:
        return probabilities.gather(1, chosen) * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, probabilities, chosen, _ = inputs
        ctx.save_for_backward(probabilities, chosen)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        probabilities, chosen = ctx.saved_tensors
        value = grad * probabilities.gather(1, chosen)
        return (-probabilities * value).scatter_add(1, chosen, value), None, None, None


@checked
@dataclass(frozen=True)
class SparseMixer:
    """Draws experts one after another, with a gradient estimator for the draw (SparseMixer-v2 of GRIN,
    arXiv:2409.12136).

    For each of top_k slots, experts with (max - z) / max(|z|, max) > 2·jitter are excluded. Training draws one of the
    others from their softmax p, evaluation takes the best. Its weight is p_i, and later slots exclude it. With a bias b
    the draw is from z + b; the weight remains that of z, by the softmax over the drawn expert and those near the best.

    In training the weight is p_i if i is the best, else p_i / 3 with probability 3/4 and p_i otherwise. The gradient of
    the logits is (δ_i - p) · p_i · grad. In expectation over both draws this is ∇ Σ_i p_i · (L_i(p_i) - L_i(0)), with
    differences by Heun's third-order rule: exact for losses L_i cubic in the weight (for the best expert, linear).
    """

    top_k: Size = 2
    jitter: NotNegativeOrInf = 0.01

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        router_logits = router_logits.reshape(-1, router_logits.shape[-1])
        if self.top_k > router_logits.shape[1]:
            raise ValueError(f"top_k: expected 1 to {router_logits.shape[1]} (num_experts), got {self.top_k}")
        logits = finite(router_logits)
        lowest = torch.finfo(logits.dtype).min / 2  # stays above the value that marks "taken"
        fixed = logits.detach().clamp(min=lowest)
        wanted = fixed if bias is None else (fixed + finite(bias)).clamp(lowest, -lowest)
        taken = torch.zeros_like(fixed, dtype=torch.bool)
        ids, weights = [], []
        for _ in range(self.top_k):
            shut = self._excluded(fixed, taken)
            out = shut if bias is None else self._excluded(wanted, taken)
            odds = wanted.masked_fill(out, -math.inf)
            drawn = best = choose(odds, 1).long()
            if context.training:
                drawn = draw(odds.softmax(-1), context)
            if bias is not None:  # the weight is a softmax of the logits, with the expert that the bias chose
                shut = shut.scatter(1, drawn, False)
            if context.training:
                probabilities = fixed.masked_fill(shut, -math.inf).softmax(-1)
                exact = (drawn == best) | (uniform((len(drawn), 1), context, logits.device) > 0.75)
                factor = torch.where(exact, 1.0, probabilities.new_full((), 1 / 3))
                weights.append(apply(_Multiplier, logits, probabilities, drawn, factor))
            else:
                weights.append(logits.masked_fill(shut, -math.inf).softmax(-1).gather(1, drawn))
            taken = taken.scatter(1, drawn, True)
            ids.append(drawn)
        return Routing(torch.cat(ids, 1).to(torch.int32), torch.cat(weights, 1), router_logits, router_logits.shape[1])

    def _excluded(self, values: Tensor, taken: Tensor) -> Tensor:
        """Experts that are taken or far from the best of the others."""
        best = values.masked_fill(taken, -math.inf).amax(-1, keepdim=True)
        far = (best - values) / values.abs().maximum(best) > 2 * self.jitter
        return taken | (far & (values != best))


@checked
@dataclass(frozen=True)
class GumbelSoftmax:
    """All experts, weighted by softmax((z + g) / tau) with Gumbel noise g. Evaluation uses no noise, or the mean of
    `samples` draws (GG MoE, arXiv:2502.03608; its code has tau = 1 and 5 samples).

    hard: only the best expert of (z + g), with weight 1; the gradient is that of its soft weight (straight-through).
    level: "token", "sequence" (one choice per sequence; task-level MoE, arXiv:2205.12701) or "batch" (one for all).
    """

    tau: PositiveOrInf = 1.0
    hard: bool = False
    samples: Count = 0
    level: Level = "token"

    @property
    def uses_bias(self) -> bool:
        """Whether a bias can move the choice: of one expert, not of all."""
        return self.hard

    @property
    def top_k(self) -> int | None:
        """1 if hard, else None."""
        return 1 if self.hard else None

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        router_logits = router_logits.reshape(-1, router_logits.shape[-1])
        logits = finite(router_logits)
        num_tokens, num_experts = logits.shape
        draws = 1 if context.training else self.samples
        total: Tensor | None = None
        for _ in range(draws):
            count, index = _draws_per_token(self.level, context, num_tokens, logits.device)
            noise = gumbel((count, num_experts), context, logits.device)
            soft = ((logits + (noise if index is None else noise[index])) / self.tau).softmax(-1)
            total = soft if total is None else total + soft
        soft = (logits / self.tau).softmax(-1) if total is None else total / draws
        if self.hard:
            odds = soft if total is not None else logits
            ids = choose(odds if bias is None else soft.detach() + bias, 1)
            chosen = soft.gather(1, ids.long())
            return Routing(ids, chosen + (1 - chosen).detach(), router_logits, num_experts, soft)
        everyone = torch.arange(num_experts, dtype=torch.int32, device=logits.device).expand(num_tokens, -1)
        return Routing(everyone, soft, router_logits, num_experts, soft)


@checked
@dataclass(frozen=True)
class Random:
    """top_k uniformly drawn experts, each with weight 1/top_k; one draw per token, sequence, or batch (THOR,
    arXiv:2110.04260, where top_k = 1). Uses only the shape of the logits: see scores.Uniform.

    evaluation: "random" draws as in training, "token" and "sequence" draw for each of them, "ensemble" averages all
    experts.
    """

    top_k: Size = 1
    level: Level = "token"
    evaluation: Literal["random", "token", "sequence", "ensemble"] = "random"

    uses_logits = False

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        router_logits = router_logits.reshape(-1, router_logits.shape[-1])
        num_tokens, num_experts = router_logits.shape
        device = router_logits.device
        if self.evaluation == "ensemble" and not context.training:
            everyone = Dense()(router_logits)
            weights = torch.full_like(everyone.topk_weights, 1 / num_experts, requires_grad=False)
            return everyone._replace(topk_weights=weights, scores=None)
        level = self.level if context.training or self.evaluation == "random" else self.evaluation
        count, index = _draws_per_token(level, context, num_tokens, device)
        if bias is not None:
            odds = gumbel((count, num_experts), context, device)
            ids, index = choose((odds if index is None else odds[index]) + bias, self.top_k), None
        elif self.top_k == 1:
            ids = torch.randint(num_experts, (count, 1), generator=context.source(), dtype=torch.int32, device=device)
        else:
            ids = choose(uniform((count, num_experts), context, device), self.top_k)
        ids = ids if index is None else ids[index]
        weights = torch.full(ids.shape, 1 / self.top_k, device=device, dtype=torch.float32)
        return Routing(ids, weights, router_logits, num_experts)
