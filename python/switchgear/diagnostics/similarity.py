# SPDX-License-Identifier: BSD-3-Clause
"""How alike the experts of a layer are, by their weights and by their outputs (arXiv:2406.18219). Matrices [E,E]."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from switchgear import ops
from switchgear.checks import checked


@checked
def expert_similarity(weights: Tensor, method: Literal["matrices", "neurons", "reordered"] = "matrices") -> Tensor:
    """Cosine similarity of the experts of weights [E,I,D] with a row per neuron (see `neurons`), [E,E] float64.

    method:
        "matrices": of the whole matrices. Neurons have no order, so experts that compute the same may differ here.
        "neurons": of the mean neuron of each expert, which no order changes.
        "reordered": of the matrices after the best one-to-one assignment of their neurons (by the sum of cosines; the
            Hungarian algorithm). Takes E²/2 assignments of I neurons.
    """
    weights = weights.detach().double()
    if method == "matrices":
        return _compute_cosines(weights.flatten(1))
    if weights.dim() != 3:
        raise ValueError(f"weights: expected [E,I,D] for {method}, got {list(weights.shape)}")
    if method == "neurons":
        return _compute_cosines(weights.mean(1))
    result = torch.eye(weights.shape[0], dtype=torch.float64)
    for i in range(weights.shape[0]):
        for j in range(i):
            moved = weights[j][neuron_order(weights[i], weights[j]).to(weights.device)]
            result[i, j] = result[j, i] = nn.functional.cosine_similarity(weights[i].flatten(), moved.flatten(), dim=0)
    return result


def neuron_order(first: Tensor, second: Tensor) -> Tensor:
    """The order of the neurons of `second` [I,D] that matches `first` best, [I] int64: the one-to-one assignment with
    the largest sum of cosines."""
    return torch.tensor(match_rows(_normalize(first.double()) @ _normalize(second.double()).T))


def match_rows(similarity: Tensor) -> list[int]:
    """For each row of [I,I] a different column, such that the sum of similarities is maximal. scipy's Hungarian method,
    or, without scipy, an auction that comes within I · 1e-6 of the range."""
    try:
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        values = similarity.cpu().float()
        step = max(float(values.max() - values.min()) * 1e-6, 1e-30)
        found: list[int] = ops.assign_balanced(values, None, 1, step, 10**6).tolist()
        return found
    _, columns = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
    result: list[int] = columns.tolist()
    return result


def neurons(gate_up_proj: Tensor, down_proj: Tensor, *, transposed: bool = False, interleaved: bool = False) -> Tensor:
    """All weights of each neuron, [E,I,D], of gate_up_proj [E,2I,H] or up_proj [E,I,H] and down_proj [E,H,I]: its rows
    of the gate and of the up projection, and its column of the down projection. D is 3H or 2H.

    transposed: they are [E,H,2I] and [E,I,H]. interleaved: gates and ups alternate, as in gpt-oss.
    """
    first, down = (side.transpose(1, 2) if transposed else side for side in (gate_up_proj, down_proj))
    num_experts, hidden_size, width = down.shape
    if first.dim() != 3 or first.shape[1] not in (width, 2 * width):
        raise ValueError(f"gate_up_proj: expected [{num_experts}, {width} or {2 * width}, {hidden_size}], "
                         f"got {list(first.shape)}")  # fmt: skip
    parts = (first[:, ::2], first[:, 1::2]) if interleaved else torch.split(first, width, 1)
    return torch.cat([*parts, down.transpose(1, 2)], -1)


@checked
def output_similarity(outputs: Tensor, method: Literal["cosine", "cka"] = "cosine") -> Tensor:
    """How alike the outputs [E,T,H] of the experts are, [E,E] float64: "cosine", the mean over tokens of the cosine
    similarity; "cka", linear centred kernel alignment (arXiv:1905.00414), which ignores rotations."""
    outputs = outputs.detach().double()
    if method == "cosine":
        units = _normalize(outputs)
        return torch.einsum("ith,jth->ij", units, units) / max(outputs.shape[1], 1)
    centred = outputs - outputs.mean(1, keepdim=True)
    number = outputs.shape[0]
    products = torch.zeros(number, number, dtype=torch.float64, device=outputs.device)
    for i in range(number):
        products[i] = (centred[i].T @ centred).square().sum((1, 2))
    norms = products.diagonal().sqrt()
    return products / (norms[:, None] * norms).clamp(min=torch.finfo(torch.float64).tiny)


def norm_vs_score_rank(outputs: Tensor, scores: Tensor) -> Tensor:
    """How the size of an expert's output goes with its score: [i,j] counts the tokens for which the expert with the
    i-th largest score [T,E] has the j-th largest output norm, [E,E] int64. Rows and columns sum to T. Counts near the
    diagonal mean that routers choose experts with large outputs."""
    norms = outputs.detach().double().norm(dim=-1).T  # [T,E]
    if norms.shape != scores.shape:
        raise ValueError(f"scores: expected {list(norms.shape)}, got {list(scores.shape)}")
    by_score = scores.argsort(dim=-1, descending=True, stable=True)
    order = norms.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(norms.shape[1], device=norms.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, places).gather(1, by_score)  # [T,i]: the place by norm
    return nn.functional.one_hot(rank, norms.shape[1]).sum(0)


def gate_embedding_correlation(gate_weight: Tensor, weights: Tensor) -> float:
    """The squared Pearson correlation between two similarities of the experts, over all pairs: of their rows in the
    router's weight [E,H], and of the mean neurons of their weights [E,I,D] (arXiv:2406.18219 finds it high for the
    gate projection). From 0 to 1; NaN if either is constant."""
    number = gate_weight.shape[0]
    if weights.shape[0] != number or number < 3:
        raise ValueError(f"weights: expected {max(number, 3)} experts, got {weights.shape[0]}")
    pairs = torch.ones(number, number).tril(-1).bool()
    sides = (_compute_cosines(gate_weight.detach().double()), expert_similarity(weights, "neurons"))
    first, second = (side[pairs.to(side.device)] for side in sides)
    return float(torch.corrcoef(torch.stack([first, second.to(first.device)]))[0, 1] ** 2)


def principal_components(rows: Tensor, count: int = 2) -> tuple[Tensor, Tensor]:
    """The coordinates of rows [N,D] along their principal components, [N,count] float64, and the fraction of the
    variance along each, [count]."""
    rows = rows.detach().double().flatten(1)
    if not 1 <= count <= min(rows.shape):
        raise ValueError(f"count: expected 1 to {min(rows.shape)}, got {count}")
    u, s, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return (u * s)[:, :count], (s.square() / s.square().sum())[:count]


def compute_product_cosines(products: Tensor) -> Tensor:
    """[E,E], of the products x_i · x_j; 0 for vectors of zeros."""
    norms = products.diagonal().clamp(min=0).sqrt()
    return products / (norms[:, None] * norms).clamp(min=1e-300)


def _normalize(rows: Tensor) -> Tensor:
    return nn.functional.normalize(rows, dim=-1, eps=torch.finfo(torch.float64).tiny)


def _compute_cosines(rows: Tensor) -> Tensor:
    units = _normalize(rows)
    return units @ units.T
