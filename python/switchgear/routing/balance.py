# SPDX-License-Identifier: BSD-3-Clause
"""Losses that keep the load of experts equal and the logits small. Float32, differentiable in router_logits."""

from __future__ import annotations

import torch
from torch import Tensor


def load_balancing_loss(router_logits: Tensor, topk_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """E · Σ_e f_e · P_e: f_e the share of tokens that chose expert e, P_e its mean softmax probability (Switch
    Transformer, arXiv:2101.03961, equation 4; for several choices the f_e add up to K, as in Hugging Face).

    Args:
        router_logits: [T,E]. topk_ids: [T,K], -1 for none; several layers may be concatenated along T.
        attention_mask: [T] or any shape with T elements, 0 for tokens that do not count.

    Returns a float32 scalar; K where the load is even. Zero tokens give 0.
    """
    num_experts = router_logits.shape[-1]
    probabilities = router_logits.float().softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter_add(
        1, topk_ids.clamp(min=0).long(), (topk_ids >= 0).to(probabilities.dtype)
    )
    if attention_mask is None:
        counted = probabilities.new_ones(probabilities.shape[0], 1)
    else:
        counted = attention_mask.reshape(-1, 1).to(probabilities.dtype)
    total = counted.sum().clamp(min=1)
    tokens_per_expert = (chosen * counted).sum(0) / total
    return num_experts * (tokens_per_expert * (probabilities * counted).sum(0) / total).sum()


def z_loss(router_logits: Tensor) -> Tensor:
    """mean_t (log Σ_e exp router_logits[t,e])², which keeps logits small (ST-MoE, arXiv:2202.08906, equation 5).

    router_logits [T,E]. Returns a float32 scalar; zero tokens give 0.
    """
    squares = router_logits.float().logsumexp(-1).square()
    return squares.sum() / max(squares.numel(), 1)
