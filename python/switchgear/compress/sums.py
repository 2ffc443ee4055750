# SPDX-License-Identifier: BSD-3-Clause
"""What a calibration keeps of a layer: sums over tokens, Hessians and a sample of tokens. All can be added."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from switchgear import ops
from switchgear.integrations.blocks import ExpertRows
from switchgear.trace.batches import stacked

Domains = str | Collection[str] | None

RATIO_BINS = 4096  # bins of second weight / first weight, in [0, 1]


@dataclass(frozen=True, eq=False)
class ExpertSums:
    """Sums over the tokens of a domain in a layer. float64, or int64 for counts."""

    tokens: Tensor  # []
    counts: Tensor  # [E] int64: choices
    weights: Tensor  # [E]: topk_weights g
    saliency: Tensor  # [E]: g · ‖f(x)‖
    norms: Tensor  # [E]: ‖f(x)‖
    outputs: Tensor  # [E,H]: f(x)
    inputs: Tensor  # [E,H]: x²
    gated_inputs: Tensor  # [E,H]: (g x)²
    hidden: Tensor  # [E,I]: a², the input of down_proj
    gated_hidden: Tensor  # [E,I]: (g a)²
    ratios: Tensor  # [4096] int64: histogram of second weight / first weight
    logits: Tensor  # [E,E]: products of the router's logits of two experts
    logit_sums: Tensor  # [E]

    @classmethod
    def zeros(cls, num_experts: int, hidden_size: int, intermediate_size: int) -> ExpertSums:
        def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype)

        e, h, i = num_experts, hidden_size, intermediate_size
        whole = torch.int64
        return cls(
            empty(dtype=whole), empty(e, dtype=whole), empty(e), empty(e), empty(e), empty(e, h), empty(e, h),
            empty(e, h), empty(e, i), empty(e, i), empty(RATIO_BINS, dtype=whole), empty(e, e), empty(e),
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        return dict(vars(self))

    def __add__(self, other: ExpertSums) -> ExpertSums:
        return ExpertSums(**{name: tensor + getattr(other, name) for name, tensor in vars(self).items()})


def sum_rows(rows: ExpertRows, topk_weights: Tensor, router_logits: Tensor | None, intermediate: int) -> ExpertSums:
    """The sums of one call with T tokens."""
    num_experts, hidden_size = len(rows.offsets) - 1, rows.inputs.shape[1]
    total = ExpertSums.zeros(num_experts, hidden_size, intermediate)
    counts = rows.offsets.long().diff().cpu()
    logits, logit_sums = total.logits, total.logit_sums
    if router_logits is not None and router_logits.shape[-1] >= num_experts:
        z = router_logits[:, :num_experts].double().nan_to_num(0.0, 0.0, 0.0)
        logits, logit_sums = (z.mT @ z).cpu(), z.sum(0).cpu()
    wide = torch.promote_types(rows.outputs.dtype, torch.float32)
    norms = torch.linalg.vector_norm(rows.outputs, dim=1, dtype=wide).double()

    def by_expert(values: Tensor) -> Tensor:
        result = torch.zeros(num_experts, dtype=torch.float64, device=values.device)
        return result.index_add_(0, rows.experts, values).cpu()

    # Sums of rows are products with a row of ones, of squares with one of g² beside it: the kernels' weight gradients.
    factors = torch.stack([torch.ones_like(rows.weights), rows.weights.square()], 1).to(wide)

    def of_rows(values: Tensor, columns: int) -> Tensor:
        some = factors[:, :columns].contiguous()
        return ops.grouped_gemm_wgrad(some, values, rows.offsets, None, False).double().cpu()

    squares = {}
    for name, values in (("inputs", rows.inputs), ("hidden", rows.hidden)):
        squares[name], squares[f"gated_{name}"] = of_rows(values.to(wide).square(), 2).unbind(1)
    return replace(
        total, tokens=torch.tensor(len(topk_weights)), counts=counts, weights=by_expert(rows.weights),
        saliency=by_expert(rows.weights * norms), norms=by_expert(norms),
        outputs=of_rows(rows.outputs.to(wide), 1).squeeze(1), ratios=count_ratios(topk_weights), logits=logits,
        logit_sums=logit_sums, **squares,
    )  # fmt: skip


def count_ratios(topk_weights: Tensor) -> Tensor:
    """Histogram of second weight / first weight, over the tokens that have both."""
    if topk_weights.shape[1] < 2:
        return torch.zeros(RATIO_BINS, dtype=torch.int64)
    best = topk_weights.double().topk(2, dim=-1).values
    best = best[best[:, 1] > 0]
    bins = (best[:, 1] / best[:, 0] * RATIO_BINS).long().clamp(0, RATIO_BINS - 1)
    return torch.bincount(bins, minlength=RATIO_BINS).cpu()


# ---- Hessians --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Hessians:
    """Xᵀ X of the inputs of both projections, by expert, float32."""

    inputs: Tensor  # [E,H,H]
    hidden: Tensor  # [E,I,I]

    def __add__(self, other: Hessians) -> Hessians:
        return Hessians(self.inputs + other.inputs, self.hidden + other.hidden)


def compute_hessians(rows: ExpertRows) -> Hessians:
    """Grouped products: the weight gradient of a layer whose output gradient is its input."""

    def products(values: Tensor) -> Tensor:
        values = values.float()
        return ops.grouped_gemm_wgrad(values, values, rows.offsets, None, False)

    return Hessians(products(rows.inputs), products(rows.hidden))


# ---- samples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Samples:
    """At most `limit` tokens of a domain: the ones with the smallest random keys, hence a uniform sample in any order
    of batches, and of the union when samples are added: then at most the smaller limit."""

    limit: int
    keys: Tensor  # [n] int64
    x: Tensor  # [n,H], input of the experts
    topk_ids: Tensor  # [n,K] int32
    topk_weights: Tensor  # [n,K] float32

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def __add__(self, other: Samples) -> Samples:
        return Samples.joined([self, other], min(self.limit, other.limit))  # more would favour the larger one

    @classmethod
    def joined(cls, parts: Sequence[Samples], limit: int) -> Samples:
        """The tokens of all parts with the smallest keys."""
        keys, x = torch.cat([part.keys for part in parts]), torch.cat([part.x for part in parts])
        ids, weights = stacked([part.topk_ids for part in parts]), stacked([part.topk_weights for part in parts], 0)
        order = keys.argsort(stable=True)[:limit]
        return cls(limit, keys[order], x[order], ids[order], weights[order])

    @classmethod
    def of(cls, limit: int, keys: Tensor, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Samples:
        order = keys.argsort(stable=True)[:limit]
        at = order.to(x.device)
        return cls(
            limit, keys[order], x.detach()[at].cpu(), topk_ids[at].int().cpu(), topk_weights.detach()[at].float().cpu()
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class LayerCalibration:
    """What is known about a layer."""

    num_experts: int
    top_k: int | None
    hidden_size: int
    intermediate_size: int
    gate: str  # hash of the router's weight, "" if it has none
    domains: Mapping[str, ExpertSums] = field(default_factory=dict)
    samples: Mapping[str, Samples] = field(default_factory=dict)
    hessians: Hessians | None = None

    @property
    def shape(self) -> tuple[object, ...]:
        """What must be equal in calibrations of one model."""
        return (self.num_experts, self.top_k, self.hidden_size, self.intermediate_size, self.gate)

    def sums(self, domains: Domains = None) -> ExpertSums:
        """The sums over some domains, all by default."""
        zeros = ExpertSums.zeros(self.num_experts, self.hidden_size, self.intermediate_size)
        return sum((self.domains[name] for name in self._chosen(domains) if name in self.domains), zeros)

    def sample(self, domains: Domains = None) -> Samples | None:
        """The tokens kept of some domains, all by default; None if there are none."""
        parts = [self.samples[name] for name in self._chosen(domains) if name in self.samples]
        return Samples.joined(parts, sum(part.limit for part in parts)) if parts else None

    def _chosen(self, domains: Domains) -> list[str]:
        if domains is None:
            return list(self.domains)
        return [domains] if isinstance(domains, str) else list(domains)

    def ratio_median(self, domains: Domains = None) -> float:
        """The median of second weight / first weight, to 1/8192: beta of SkipBelow. NaN without such tokens."""
        counts = self.sums(domains).ratios.cumsum(0)
        total = int(counts[-1])
        if not total:
            return float("nan")
        return (int((counts < (total + 1) // 2).sum()) + 0.5) / RATIO_BINS

    def __add__(self, other: LayerCalibration) -> LayerCalibration:
        """Raises ValueError if one part has Hessians and the other has tokens, but none."""
        hessians = self.hessians if other.hessians is None else other.hessians
        if self.hessians is not None and other.hessians is not None:
            hessians = self.hessians + other.hessians
        elif hessians is not None and any(part.domains and part.hessians is None for part in (self, other)):
            raise ValueError("calibration: expected both parts with hessians=True, or none, got one of them")
        return replace(
            self, domains=_join(self.domains, other.domains), samples=_join(self.samples, other.samples),
            hessians=hessians,
        )  # fmt: skip


def _join(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(one)
    for name, value in other.items():
        result[name] = result[name] + value if name in result else value
    return result
