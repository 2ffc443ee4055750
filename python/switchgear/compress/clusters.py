# SPDX-License-Identifier: BSD-3-Clause
"""Groups of similar experts, and the rows of neurons in another order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def hierarchical(distances: Tensor, count: int) -> list[list[int]]:
    """Agglomerative clustering of distances [E,E] with average linkage: the two closest clusters are joined until
    `count` are left (HC-SMoE, arXiv:2410.08589). Ascending lists, by their first item."""
    mean = distances.double().clone()
    mean.fill_diagonal_(torch.inf)
    clusters = {index: [index] for index in range(len(mean))}
    while len(clusters) > count:
        one, other = divmod(int(mean.argmin()), len(mean))
        one, other = min(one, other), max(one, other)
        a, b = len(clusters[one]), len(clusters[other])
        row = (a * mean[one] + b * mean[other]) / (a + b)  # inf for clusters that are gone, and for both
        mean[one], mean[:, one] = row, row
        mean[one, one] = torch.inf
        mean[other], mean[:, other] = torch.inf, torch.inf
        clusters[one] = sorted(clusters[one] + clusters.pop(other))
    return sorted(clusters.values())


def around_dominant(similarity: Tensor, frequency: Tensor, count: int) -> list[list[int]]:
    """The `count` most frequent experts, each with the others that are most similar to it (M-SMoE, arXiv:2310.01334).
    Ascending lists, by their first item."""
    dominant = frequency.argsort(descending=True, stable=True)[:count].tolist()
    groups = {expert: [expert] for expert in dominant}
    for expert in range(len(frequency)):
        if expert not in groups:
            nearest = dominant[int(similarity[expert, dominant].argmax())]
            groups[nearest].append(expert)
    return sorted(sorted(group) for group in groups.values())


def rows_in_order(order: Sequence[int], parts: int, interleaved: bool) -> Tensor:
    """The rows of the first projection for neurons in `order`."""
    index = torch.tensor(order)
    if interleaved:
        return (index[:, None] * parts + torch.arange(parts)).flatten()
    return (torch.arange(parts)[:, None] * len(index) + index).flatten()
