# SPDX-License-Identifier: BSD-3-Clause
"""Losses that balance the load of experts and keep the logits small: differentiable functions of tensors, in float32
(float64 for float64).

load_balancing_loss and z_loss take arrays of other libraries too. losses.py wraps the losses as options of a router,
with coefficients. T tokens, E experts, K choices per token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from switchgear.arrays import accepts_arrays
from switchgear.checks import convert
from switchgear.functional import Routing
from switchgear.reference import weight_dtype, wide
from switchgear.routing.ranking import finite

TINY = torch.finfo(torch.float32).tiny
_LEAST_STD = 1e-30  # 40 / this is finite in float32


@accepts_arrays
def load_balancing_loss(router_logits: Tensor, topk_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """E · Σ_e f_e · P_e: f_e is the fraction of tokens that chose expert e, P_e its mean softmax probability (Switch
    Transformer, arXiv:2101.03961, equation 4; with K choices the f_e sum to K, as in Hugging Face).

    Args:
        router_logits: [T,E]. topk_ids: [T,K], -1 for empty choices; layers may be concatenated along T.
        attention_mask: [T] or any shape with T elements, 0 for tokens to ignore, whose logits may be NaN.

    Returns a scalar in float32 (float64 for float64), K for an even load. Zero tokens give 0. Raises ValueError if the
    arguments are not of the same tokens.
    """
    if router_logits.dim() != 2:
        raise ValueError(f"router_logits: expected shape [T,E], got {list(router_logits.shape)}")
    num_tokens = router_logits.shape[0]  # not len(), which torch.export would take for a constant
    if topk_ids.dim() != 2 or topk_ids.shape[0] != num_tokens:
        raise ValueError(f"topk_ids: expected shape [T={num_tokens},K], got {list(topk_ids.shape)}")
    if attention_mask is not None and attention_mask.numel() != num_tokens:
        raise ValueError(f"attention_mask: expected T={num_tokens} elements, got {list(attention_mask.shape)}")
    num_experts = router_logits.shape[-1]
    if attention_mask is not None:
        router_logits = torch.where(attention_mask.reshape(-1, 1).bool(), router_logits, 0)
    probabilities = wide(router_logits).softmax(-1)
    chosen = times_chosen(topk_ids, probabilities)
    if attention_mask is None:
        counted = probabilities.new_ones(probabilities.shape[0], 1)
    else:
        counted = attention_mask.reshape(-1, 1).to(probabilities.dtype)
    total = counted.sum().clamp(min=1)
    tokens_per_expert = (chosen * counted).sum(0) / total
    return num_experts * (tokens_per_expert * (probabilities * counted).sum(0) / total).sum()


@accepts_arrays
def z_loss(router_logits: Tensor) -> Tensor:
    """mean_t (log Σ_e exp router_logits[t,e])², which keeps logits small (ST-MoE, arXiv:2202.08906, equation 5).

    router_logits [T,E]. The mean is over tokens with a logit above the lowest number, which masked experts have.
    Returns a scalar in float32 (float64 for float64); zero tokens give 0.
    """
    if not router_logits.is_floating_point():
        raise TypeError(f"router_logits: expected a floating dtype, got {router_logits.dtype}")
    closed = (router_logits <= torch.finfo(router_logits.dtype).min).all(-1, keepdim=True)
    squares = wide(torch.where(closed, 0, router_logits)).logsumexp(-1, keepdim=True).square()
    counted = (~closed).to(squares.dtype)
    return (squares * counted).sum() / counted.sum().clamp(min=1)


def times_chosen(topk_ids: Tensor, like: Tensor) -> Tensor:
    """[T,E], how often each token chose each expert in topk_ids [T,K], in the dtype of `like` [T,E]."""
    return torch.zeros_like(like).scatter_add(1, topk_ids.clamp(min=0).long(), (topk_ids >= 0).to(like.dtype))


def count_tokens(topk_ids: Tensor, num_experts: int) -> Tensor:
    """tokens_per_expert [E] int64: how many choices in topk_ids [T,K] selected each expert; holes (-1) do not count."""
    shifted = topk_ids.flatten().long() + 1  # holes are counted at index 0
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=topk_ids.device)
    return counts.scatter_add(0, shifted, torch.ones_like(shifted))[1:]  # in place, torch.func.vmap would refuse it


def spans_processes(group: Any) -> bool:
    """Whether counts are summed over processes: those of `group`, or of the default group if it is None and there is
    one."""
    return group is not None or (dist.is_available() and dist.is_initialized())


def sum_over_processes(counts: Tensor, group: Any) -> Tensor:
    """counts, summed in place over these processes."""
    if spans_processes(group):
        dist.all_reduce(counts, group=group)
    return counts


def max_violation(tokens_per_expert: Tensor) -> Tensor:
    """MaxVio = (max_e n_e - mean n) / mean n for tokens_per_expert [..., E]: [...] float32, 0 for an even load
    (arXiv:2408.15664). No tokens give 0."""
    convert("tokens_per_expert", tokens_per_expert, Tensor)
    counts = tokens_per_expert.float()
    mean = counts.mean(-1)
    return (counts.amax(-1) - mean) / mean.clamp(min=TINY)


def router_probabilities(routing: Routing, score_function: str | None = None) -> Tensor:
    """The probabilities [T,E] float32 that the losses use; each row sums to 1.

    score_function: "softmax" of the logits; "sigmoid" of the logits, divided by its sum (DeepSeek-V3,
    arXiv:2412.19437); None: routing.scores divided by their sum if the router provides them, else the softmax.
    """
    if score_function not in (None, "softmax", "sigmoid"):
        raise ValueError(f"score_function: expected 'softmax', 'sigmoid' or None, got {score_function!r}")
    logits = wide(routing.router_logits)
    if score_function == "sigmoid":
        scores = logits.sigmoid()
    elif score_function is None and routing.scores is not None:
        scores = routing.scores
    else:
        return logits.softmax(-1)
    return scores / scores.sum(-1, keepdim=True).clamp(min=TINY)


# ---- load balance ----------------------------------------------------------------------------------------------------


def switch_loss(probabilities: Tensor, tokens_per_expert: Tensor, num_tokens: Tensor | int) -> Tensor:
    """E · Σ_e f_e · P_e, with f_e = tokens_per_expert[e] / num_tokens and P_e the mean of probabilities [T,E].

    The counts may cover more than these T tokens: all processes and all micro-batches of a step (arXiv:2501.11873).
    Switch Transformer, arXiv:2101.03961, equation 4. Returns a scalar, 0 without tokens.
    """
    probabilities = wide(probabilities)
    total = torch.as_tensor(num_tokens, device=tokens_per_expert.device).clamp(min=1)
    fraction = tokens_per_expert.to(probabilities.dtype) / total
    return probabilities.shape[1] * (fraction * mean_probabilities(probabilities)).sum()


def sequence_switch_loss(
    probabilities: Tensor, topk_ids: Tensor, sequence_ids: Tensor, num_sequences: int, per_choice: bool = False
) -> Tensor:
    """The mean of switch_loss over sequences (the sequence-wise loss of arXiv:2412.19437).

    probabilities [T,E], topk_ids [T,K], sequence_ids [T] in [0, num_sequences). Sequences without tokens contribute 0.
    per_choice: f_e is a fraction of the choices of the sequence, instead of its tokens.
    """
    probabilities = wide(probabilities)
    num_experts = probabilities.shape[1]
    sequence_ids = sequence_ids.long()
    exact = probabilities.to(exact_dtype(probabilities))
    tokens = exact.new_zeros(num_sequences).index_add(0, sequence_ids, exact.new_ones(len(topk_ids)))
    cells = sequence_ids[:, None] * (num_experts + 1) + topk_ids.long() + 1
    counts = total_weights(cells, exact.new_ones(cells.shape), num_sequences * (num_experts + 1))
    counts = counts.view(num_sequences, num_experts + 1)[:, 1:]
    totals = exact.new_zeros(num_sequences, num_experts).index_add(0, sequence_ids, exact)
    tokens = tokens.clamp(min=1)[:, None]
    of = counts.sum(1, keepdim=True).clamp(min=1) if per_choice else tokens
    loss = num_experts * (counts / of * (totals / tokens)).sum() / max(num_sequences, 1)
    return loss.to(probabilities.dtype)


def null_aware_switch_loss(
    probabilities: Tensor, tokens_per_expert: Tensor, num_tokens: Tensor | int, num_null: int
) -> Tensor:
    """switch_loss over E experts; the last `num_null` are null experts, whose load is averaged: they are
    interchangeable, so the loss must not prefer one over another (AdaMoE, arXiv:2406.13233)."""
    load = tokens_per_expert.to(weight_dtype(probabilities.dtype))
    if num_null:
        null = load[-num_null:]
        load = torch.cat((load[:-num_null], null.mean().expand_as(null)))
    return switch_loss(probabilities, load, num_tokens)


def squared_variation(values: Tensor) -> Tensor:
    """CV² = variance / mean² of values [N], with the population variance; 0 if all are equal."""
    exact = values.to(exact_dtype(values))
    mean = exact.mean()
    variation: Tensor = (exact - mean).square().mean() / mean.square().clamp(min=TINY)
    return variation.to(weight_dtype(values.dtype))


def importance_loss(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> Tensor:
    """CV² of the experts' total weights (Shazeer et al., arXiv:1701.06538)."""
    totals = total_weights(topk_ids.long() + 1, topk_weights, num_experts + 1)[1:]
    return squared_variation(totals).to(weight_dtype(topk_weights.dtype))


def smooth_load(
    router_logits: Tensor, top_k: int | Tensor, noise_std: float | Tensor = 1.0, clean_logits: Tensor | None = None
) -> Tensor:
    """[E]: the expected number of tokens that choose each expert if only its logit is redrawn with noise `noise_std`.

    Σ_t Φ((c[t,e] - k-th largest z of the others) / noise_std); differentiable, unlike counts (arXiv:1701.06538,
    equations 8 to 10). router_logits z [T,E]. top_k: k, or that of each token, [T] integers from 0 on. noise_std: a
    number, or that of each logit, [T,E]. clean_logits c [T,E]: without the noise that z has; z if None.
    """
    logits = finite(router_logits)
    clean = logits if clean_logits is None else finite(clean_logits)
    if not isinstance(noise_std, Tensor):
        noise_std = logits.new_full((), noise_std)
    std = finite(noise_std).clamp(min=_LEAST_STD)
    end = logits.new_full((logits.shape[0], 1), math.inf)  # before the best, and its negative behind the last
    best = torch.cat((end, logits.sort(dim=-1, descending=True).values, -end), 1)
    k = torch.zeros_like(end, dtype=torch.int64) + (top_k[:, None] if isinstance(top_k, Tensor) else top_k)
    k = k.clamp(max=logits.shape[1])
    last_in, first_out = best.gather(1, k), best.gather(1, k + 1)
    threshold = torch.where(logits >= last_in, first_out, last_in)
    distance = (clean - threshold).clamp(-40 * std, 40 * std)  # the gradient of an infinite one would be NaN
    chances = torch.special.ndtr(distance / std)
    load: Tensor = chances.sum(0, dtype=exact_dtype(chances)).to(chances.dtype)
    return load


# ---- helpers ---------------------------------------------------------------------------------------------------------


def mean_probabilities(probabilities: Tensor) -> Tensor:
    return probabilities.sum(0) / max(len(probabilities), 1)


def total_weights(cells: Tensor, weights: Tensor, num_cells: int) -> Tensor:
    """[num_cells]: the sums of weights by cell, for weights and cells of one shape. In float64: in float32, sums
    of millions of them lose digits, and from 2^24 on adding 1 changes nothing."""
    totals = weights.new_zeros(num_cells, dtype=exact_dtype(weights))
    return totals.scatter_add(0, cells.flatten(), weights.flatten().to(totals.dtype))


def exact_dtype(values: Tensor) -> torch.dtype:
    """float64, where a device has it."""
    return torch.float32 if values.device.type == "mps" else torch.float64
