# SPDX-License-Identifier: BSD-3-Clause
"""Losses that a trainer calls itself: on two passes through a model, and on per-token gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from switchgear import ops
from switchgear.checks import PositiveOrInf, checked
from switchgear.functional import Routing, permute, plan
from switchgear.routing.ranking import is_open


def without_padding(mask: Tensor | None, **logits: Tensor) -> list[Tensor]:
    """Logits [..., V] of one shape, zeros where mask [...] is false: a NaN there would reach the gradient. Raises
    ValueError for another shape."""
    shape: torch.Size | None = None
    for name, tensor in logits.items():
        shape = tensor.shape if shape is None else shape
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if mask is None:
        return list(logits.values())
    if shape is not None and mask.shape != shape[:-1]:
        raise ValueError(f"mask: expected shape {list(shape[:-1])}, got {list(mask.shape)}")
    return [torch.where(mask.bool()[..., None], tensor, 0) for tensor in logits.values()]


def mean_of_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of values [...] where mask [...] is true; 0 for none."""
    if mask is None:
        return values.sum() / max(values.numel(), 1)
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) [...] of log-probabilities [..., V], without the terms of p = 0, whose logarithm is -inf."""
    absent = log_p == -torch.inf  # 0 · log 0 is 0; masked before, so that gradients are finite
    log_ratio = log_p.masked_fill(absent, 0) - log_q.masked_fill(absent, 0)
    return (log_p.exp() * log_ratio).sum(-1)


@checked
def consistency_loss(first_logits: Tensor, second_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """(KL(p1 || p2) + KL(p2 || p1)) / 2 of two passes with different experts, averaged over tokens (THOR,
    arXiv:2110.04260).

    first_logits, second_logits: [..., V], the model's output; p = softmax. mask [...]: False for padding, whose logits
    may be NaN. A logit may be -inf in both passes. The loss is symmetric, and 0 for equal passes.
    """
    first_logits, second_logits = without_padding(mask, first_logits=first_logits, second_logits=second_logits)
    log_p, log_q = first_logits.float().log_softmax(-1), second_logits.float().log_softmax(-1)
    return mean_of_tokens((kl_divergence(log_p, log_q) + kl_divergence(log_q, log_p)) / 2, mask)


@checked
def output_regularization(
    old_logits: Tensor, new_logits: Tensor, mask: Tensor | None = None, *, temperature: PositiveOrInf = 1.0
) -> Tensor:
    """temperature² · KL(p_old || p_new), averaged over tokens: keeps a model's outputs near those that it had before it
    got new experts (Lifelong-MoE, arXiv:2305.12281; Learning without Forgetting, arXiv:1606.09282).

    old_logits, new_logits: [..., V]; p = softmax(logits / temperature). The old ones get no gradient. mask [...]: False
    for padding, whose logits may be NaN. An old logit may be -inf. 0 for equal outputs.
    """
    old_logits, new_logits = without_padding(mask, old_logits=old_logits, new_logits=new_logits)
    log_p = (old_logits.detach().float() / temperature).log_softmax(-1)
    log_q = (new_logits.float() / temperature).log_softmax(-1)
    return mean_of_tokens(temperature**2 * kl_divergence(log_p, log_q), mask)


def anchor_loss(router_probabilities: Tensor, expert: int) -> Tensor:
    """mean_t ‖g_t - onehot(expert)‖²: keeps the expert that unlearns selected (SEUF, arXiv:2411.18797).

    router_probabilities: g [T,E], as of routing.balance.router_probabilities. 0 if all tokens go to the expert alone.
    """
    num_experts = router_probabilities.shape[-1]
    if not 0 <= expert < num_experts:
        raise ValueError(f"expert: expected 0 to {num_experts - 1}, got {expert}")
    g = router_probabilities.float()
    target = g.new_zeros(num_experts)
    target[expert] = 1
    distance = (g - target).square().sum(-1)
    return distance.sum() / max(distance.numel(), 1)


def gradient_conflicts(grad_y: Tensor, routing: Routing, tau: float = 0.0) -> Tensor:
    """Whether each choice's gradient conflicts with the mean gradient of its expert's tokens, [T,K] bool.

    Token t sends the gradient w · grad_y[t] into the output of expert e (the gradient of a bias added to that output).
    A choice conflicts if the cosine between this and the mean over the expert's tokens is below tau (STGC,
    arXiv:2406.19905; tau unverified).

    grad_y: [..., H], the gradient of the loss with respect to the experts' output. routing: of the same T tokens.
    """
    grad_y = grad_y.detach().reshape(-1, grad_y.shape[-1]).float()
    ids, weights = routing.topk_ids, routing.topk_weights.detach().float()
    layout = plan(ids, routing.num_experts)
    rows = permute(grad_y, layout, weights)
    total = ops.grouped_gemm_wgrad(rows, rows.new_ones(len(rows), 1), layout.expert_offsets, None, False).squeeze(-1)
    total = F.normalize(total, dim=-1)  # the mean has the direction of the sum
    cosine = (F.normalize(grad_y, dim=-1) @ total.T).gather(1, ids.clamp(min=0).long()) * weights.sign()
    return (cosine < tau) & (ids >= 0)


def gradient_conflict_loss(routing: Routing, conflicts: Tensor) -> Tensor:
    """mean over conflicting choices of -log softmax(-z)[e]; lowers the logit of that expert (STGC, arXiv:2406.19905;
    the form is unverified). The softmax is over the experts that a mask leaves open. conflicts [T,K] bool. 0 without
    conflicts."""
    logits = routing.router_logits.float()
    against = (-logits).masked_fill(~is_open(routing.router_logits), torch.finfo(logits.dtype).min)
    losses = -against.log_softmax(-1).gather(1, routing.topk_ids.clamp(min=0).long())
    return (losses * conflicts).sum() / conflicts.sum().clamp(min=1)


class Conflict(NamedTuple):
    loss: Tensor  # scalar, differentiable in the router
    conflicts: Tensor  # [T,K] bool


class GradientConflict:
    """Finds the tokens whose gradients conflict with the other tokens of their expert, and computes a loss that moves
    them to other experts (STGC, arXiv:2406.19905).

        stgc = GradientConflict()
        y, routing = moe(x)                             # return_routing=True
        task_loss = …
        (task_loss + 0.01 * stgc(task_loss, y, routing).loss).backward()

    It first computes the gradient of the loss with respect to y: a backward pass through everything after the layer.
    tau: a token conflicts if its cosine is below this (unverified).
    """

    def __init__(self, tau: float = 0.0) -> None:
        self.tau = tau

    def __call__(self, loss: Tensor, y: Tensor, routing: Routing) -> Conflict:
        """loss: a scalar that depends on y, the output of the layer or of its experts."""
        (grad_y,) = torch.autograd.grad(loss, y, retain_graph=True)
        conflicts = gradient_conflicts(grad_y, routing, self.tau)
        return Conflict(gradient_conflict_loss(routing, conflicts), conflicts)
