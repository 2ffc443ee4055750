# SPDX-License-Identifier: BSD-3-Clause
"""One layer of routed experts of another library's model: fused, or around the model's own gate."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from switchgear import functional
from switchgear.backends import in_autocast
from switchgear.functional.products import AnyWeight
from switchgear.integrations.gates import find_gate, get_own_gate
from switchgear.ops import GluOptions
from switchgear.weights import AdaptedWeight, SelectedWeight, Weight
from switchgear.weights.weight import OffloadedWeight


class ExpertWeights(NamedTuple):
    """Views of a model's parameters, never copies, stored weights (switchgear.store), or ExpertLinears. N is 2I for
    gated experts, I for plain ones."""

    gate_up_proj: AnyWeight  # [E, N, H]
    down_proj: AnyWeight  # [E, H, I]
    gate_up_bias: Tensor | None = None  # [E, N]
    down_bias: Tensor | None = None  # [E, H]


class ExpertLinears(NamedTuple):
    """The matrices of a projection as linear layers, which are called: those of expert e are experts.<e>.<name>."""

    experts: nn.Module
    names: tuple[str, ...]  # gate_proj and up_proj, whose results are joined; or one
    interleaved: bool  # the columns of gate and up alternate
    shape: tuple[int, int, int]
    dtype: torch.dtype

    def project(self, x: Tensor, expert_offsets: Tensor, token_indices: Tensor | None) -> Tensor:
        """[S,N]: results for x, or for its rows `token_indices` [S], ordered by expert. An expert without rows is not
        called."""
        offsets = expert_offsets.tolist()
        count = len(x) if token_indices is None else len(token_indices)
        rows = x if token_indices is None else x[token_indices[: offsets[-1]]]
        results = []
        for expert, (begin, end) in enumerate(itertools.pairwise(offsets)):
            if begin < end:
                part = self.experts.get_submodule(str(expert))
                parts = [self._call(getattr(part, name), rows[begin:end]) for name in self.names]
                results.append(torch.stack(parts, -1).flatten(1) if self.interleaved else torch.cat(parts, -1))
        empty = x.new_zeros(count - offsets[-1], self.shape[1])
        return torch.cat((*results, empty.to(results[0].dtype) if results else empty))

    def _call(self, linear: nn.Module, x: Tensor) -> Tensor:
        """In the dtype that the layer has now: a tool may have cast it."""
        dtypes = (each.dtype for each in linear.parameters() if each.is_floating_point() and each.itemsize > 1)
        result: Tensor = linear(x.to(next(dtypes, self.dtype)))
        return result


# Classes of experts whose own loop over experts takes ids below E only. Those of all others skip the id E.
_WITHOUT_THE_LAST_ID = ("GptOssExperts", "NemotronHExperts", "OpenAIPrivacyFilterExperts")


def is_of(module: nn.Module, *names: str) -> bool:
    """Whether the class of a module, or one that it extends, has one of the names: FSDP2 and torch's parametrizations
    put a class of another name before it."""
    return any(base.__name__ in names for base in type(module).__mro__)


def skips_the_last_id(module: nn.Module) -> bool:
    """Whether the class's own forward takes the id E for an empty slot."""
    return not is_of(module, *_WITHOUT_THE_LAST_ID)


def has_post_norm(module: nn.Module) -> bool:
    """Whether an experts module normalises each expert's output before it is weighted."""
    return getattr(module, "has_post_expert_norm", False)


def run_experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: ExpertWeights, module: Any) -> Tensor:
    """y[t] = sum_k topk_weights[t,k] * expert(x[t]), in the dtype of x. The module of the experts has their gate: a
    known one is fused, another one is called between two grouped GEMMs, as is one whose experts end with a norm.

    x: [T, H]. topk_ids: [T, K] integers, -1 for an empty slot. topk_weights: [T, K] of any float dtype.
    """
    calls_layers, is_normed = isinstance(weights.gate_up_proj, ExpertLinears), has_post_norm(module)
    gate = None if calls_layers or is_normed else find_gate(module)
    if gate is not None:
        return run_fused(x, topk_ids, topk_weights, weights, gate)
    plan = functional.plan(topk_ids, weights.gate_up_proj.shape[0])
    h = project(x, weights.gate_up_proj, plan.expert_offsets, weights.gate_up_bias, plan.token_indices)
    permuted_y = project(get_own_gate(module)(h), weights.down_proj, plan.expert_offsets, weights.down_bias)
    if is_normed:
        permuted_y = module.post_expert_norm(permuted_y)
    return functional.combine(permuted_y, plan, topk_weights).to(x.dtype)


def run_fused(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: ExpertWeights, gate: GluOptions) -> Tensor:
    y = functional.moe(
        _cast(x, weights.gate_up_proj),
        weights.gate_up_proj,
        weights.down_proj,
        topk_ids,
        topk_weights,
        gate_up_bias=weights.gate_up_bias,
        down_bias=weights.down_bias,
        **gate.keywords(),
    )
    return y.to(x.dtype)


def _cast(x: Tensor, weight: AnyWeight) -> Tensor:
    """x in the dtype of the weights, in which models may keep their experts alone. Rounded weights take any dtype."""
    held = weight.weight if isinstance(weight, (AdaptedWeight, SelectedWeight)) else weight
    if held.dtype is x.dtype or in_autocast(x.device.type):
        return x
    return x.to(held.dtype) if isinstance(held, Tensor) or getattr(held, "is_lossless", False) else x


def project(
    x: Tensor,
    weight: AnyWeight | ExpertLinears | Sequence[Tensor],
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    token_indices: Tensor | None = None,
) -> Tensor:
    """`switchgear.grouped_gemm` with x cast to the dtype of the weights: models may keep weights in a wider dtype."""
    if isinstance(weight, ExpertLinears):
        return weight.project(x, expert_offsets, token_indices)
    first: Any = weight
    if type(first) in (list, tuple):  # an AdaptedWeight is a NamedTuple, and no list of matrices
        first = first[0]
    return functional.grouped_gemm(x.to(first.dtype), weight, expert_offsets, bias=bias, token_indices=token_indices)


def list_tensors(weights: Iterable[Any]) -> list[Any]:
    """All that the kernels read of some weights: nested sequences, with adapters, or None for an absent bias."""
    found: list[Any] = []
    for weight in weights:
        if isinstance(weight, AdaptedWeight):
            found += list_tensors((weight.weight, weight.a, weight.b))
        elif isinstance(weight, SelectedWeight):
            found += list_tensors(weight[:2])
        elif isinstance(weight, (tuple, list)):
            found += list_tensors(weight)
        elif weight is not None:
            found.append(weight)
    return found


def find_unreadable(weights: Iterable[Any]) -> str | None:
    """Why the kernels cannot read some weight, or None. Tensor subclasses (torchao, DTensor) have their own format."""
    for weight in list_tensors(weights):
        plain = type(weight) in (Tensor, nn.Parameter, Weight, OffloadedWeight)
        if not plain and not isinstance(weight, (FakeTensor, FunctionalTensor)):  # tracing: both stand for plain ones
            return f"a weight is a {type(weight).__name__}, not a plain tensor"
    return None
