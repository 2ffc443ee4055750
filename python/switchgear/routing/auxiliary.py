# SPDX-License-Identifier: BSD-3-Clause
"""Losses that a trainer calls itself: of two passes through a model, and of the gradients of tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from switchgear import ops
from switchgear.functional import Routing, permute, plan


def consistency_loss(first_logits: Tensor, second_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(p1 || p2) + KL(p2 || p1), averaged over tokens, of two passes with different experts (THOR, arXiv:2110.04260).

    first_logits, second_logits: [..., V], the model's output; p = softmax. mask [...]: False for padding. Symmetric, 0
    for equal passes.
    """
    log_p, log_q = first_logits.float().log_softmax(-1), second_logits.float().log_softmax(-1)
    divergence = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
    if mask is None:
        return divergence.sum() / max(divergence.numel(), 1)
    mask = mask.to(divergence.dtype)
    return (divergence * mask).sum() / mask.sum().clamp(min=1)


def gradient_conflicts(grad_y: Tensor, routing: Routing, tau: float = 0.0) -> Tensor:
    """Whether each choice pulls its expert elsewhere than the expert's tokens do on average, [T,K] bool.

    The gradient that token t sends into expert e's output (that of a bias behind the expert) is w · grad_y[t]; a choice
    conflicts where the cosine between it and the mean over the expert's tokens is below tau (STGC, arXiv:2406.19905;
    tau unverified).

    grad_y: [..., H], the loss's gradient in the output of the experts. routing: of the same T tokens.
    """
    grad_y = grad_y.detach().reshape(-1, grad_y.shape[-1]).float()
    ids, weights = routing.topk_ids, routing.topk_weights.detach().float()
    layout = plan(ids, routing.num_experts)
    rows = permute(grad_y, layout, weights)
    total = ops.grouped_gemm_wgrad(rows, rows.new_ones(len(rows), 1), layout.expert_offsets, None, False).squeeze(-1)
    total = F.normalize(total, dim=-1)  # the direction of the mean is that of the sum
    cosine = (F.normalize(grad_y, dim=-1) @ total.T).gather(1, ids.clamp(min=0).long()) * weights.sign()
    return (cosine < tau) & (ids >= 0)


def gradient_conflict_loss(routing: Routing, conflicts: Tensor) -> Tensor:
    """mean over conflicting choices of -log softmax(-z)[e]: pushes the logit of the expert down (STGC,
    arXiv:2406.19905; the form is unverified). conflicts [T,K] bool. 0 without conflicts."""
    losses = -(-routing.router_logits.float()).log_softmax(-1).gather(1, routing.topk_ids.clamp(min=0).long())
    return (losses * conflicts).sum() / conflicts.sum().clamp(min=1)


class Conflict(NamedTuple):
    loss: Tensor  # scalar, differentiable in the router
    conflicts: Tensor  # [T,K] bool


class GradientConflict:
    """Finds the tokens whose gradients contradict their expert's others, and a loss that sends them elsewhere (STGC,
    arXiv:2406.19905).

        stgc = GradientConflict()
        y, routing = moe(x)                             # return_routing=True
        task_loss = …
        (task_loss + 0.01 * stgc(task_loss, y, routing).loss).backward()

    It takes the gradient of the loss in y first: a backward pass of what comes behind the layer. tau: the cosine below
    which a token conflicts (unverified).
    """

    def __init__(self, tau: float = 0.0) -> None:
        self.tau = tau

    def __call__(self, loss: Tensor, y: Tensor, routing: Routing) -> Conflict:
        """loss: a scalar that depends on y, the output of the layer, or of its experts."""
        (grad_y,) = torch.autograd.grad(loss, y, retain_graph=True)
        conflicts = gradient_conflicts(grad_y, routing, self.tau)
        return Conflict(gradient_conflict_loss(routing, conflicts), conflicts)
