# SPDX-License-Identifier: BSD-3-Clause
"""More experts for a trained MoE layer, beside frozen old ones (Lifelong-MoE, arXiv:2305.12281)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.experts import Experts
from switchgear.routing.router import Router
from switchgear.weights import advise_huge_pages, stored_of
from switchgear.weights.adapted import adapters_of
from switchgear.weights.selected import select, selection_of

_OWN = {"weight", "bias", "e_score_correction_bias"}  # tensors of a linear router


def expand(
    moe: nn.Module, count: int, init: str, sources: Sequence[int] | None, freeze_old: bool
) -> list[nn.Parameter]:
    """See MoE.expand."""
    experts, gate = _parts(moe, count)
    chosen = _sources(sources, init, count, experts.num_experts)

    def rows(module: Experts | Router) -> dict[str, Tensor]:
        if init == "copy":
            return {name: tensor.detach()[chosen] for name, tensor in _tensors(module).items()}
        return {name: tensor.detach() for name, tensor in _tensors(_fresh(module, count)).items()}

    return _grow(experts, gate, rows(experts), rows(gate), freeze_old)


def add_expert(
    moe: nn.Module, expert: Mapping[str, Tensor], gate_weight: Tensor, gate_bias: float, freeze_old: bool
) -> int:
    """See MoE.add_expert."""
    experts, gate = _parts(moe, 1)
    wanted = _tensors(experts)
    if set(expert) != set(wanted):
        raise ValueError(f"expert: expected the keys {', '.join(wanted)}, got {', '.join(expert) or 'none'}")
    given = {**expert, "gate_weight": gate_weight}
    shapes = {name: tensor.shape[1:] for name, tensor in wanted.items()} | {"gate_weight": (gate.hidden_size,)}
    for name, tensor in given.items():
        if tensor.shape != shapes[name]:
            raise ValueError(f"{name}: expected shape {list(shapes[name])}, got {list(tensor.shape)}")
    if gate_bias != 0 and gate.bias is None:
        raise ValueError(f"gate_bias: expected 0 for a router without bias (router_bias), got {gate_bias}")
    rows = {name: tensor.detach()[None] for name, tensor in expert.items()}
    of_gate = {name: torch.zeros_like(tensor[:1]) for name, tensor in _tensors(gate).items()}
    of_gate["weight"] = gate_weight.detach()[None]
    if gate.bias is not None:
        of_gate["bias"] = torch.full_like(gate.bias.detach()[:1], gate_bias)
    _grow(experts, gate, rows, of_gate, freeze_old)
    return experts.num_experts - 1


def _parts(moe: Any, count: int) -> tuple[Experts, Router]:
    """The experts and the router of a layer that can grow. Raises ValueError for others."""
    experts, gate = moe.experts, moe.gate
    if type(experts) is not Experts:
        raise ValueError(f"experts: expected switchgear.Experts, all in this process, got {type(experts).__name__}")
    if (stored := stored_of(experts)) is not None:
        raise ValueError(f"experts: expected plain weights, got {stored.form}; {stored.form.remedy}")
    if adapters_of(experts):
        raise ValueError("experts: expected none with adapters")
    if selection_of(experts) is not None or selection_of(gate) is not None:
        raise ValueError("experts: expected none that train alone already; call finetune.unfreeze(model) first")
    if gate.weight is None:
        raise ValueError(f"gate: expected a linear router, got one with score={type(gate.score).__name__}")
    gate.check_resizable("gate")
    if (experts.num_experts + count) % gate.num_groups:
        total = experts.num_experts + count
        raise ValueError(f"num_new: expected a multiple of {gate.num_groups} groups of experts in all, got {total}")
    return experts, gate


def _sources(sources: Sequence[int] | None, init: str, count: int, num_experts: int) -> list[int]:
    if sources is None:
        return [index % num_experts for index in range(count)]
    sources = list(sources)
    if init != "copy":
        raise ValueError(f"sources: expected None with init={init!r}, got {sources}")
    if len(sources) != count or not all(0 <= expert < num_experts for expert in sources):
        raise ValueError(f"sources: expected {count} experts in 0 to {num_experts - 1}, got {sources}")
    return sources


def _tensors(module: Experts | Router) -> dict[str, Tensor]:
    """The tensors [E,…] of the experts or the router."""
    if isinstance(module, Experts):
        return dict(module.named_parameters(recurse=False))
    own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return {name: tensor for name, tensor in own.items() if name in _OWN}


def _fresh(module: Experts | Router, count: int) -> Experts | Router:
    """A module of `count` experts, initialised like `module`."""
    like: Tensor = next(module.parameters())
    if isinstance(module, Router):
        return Router(
            module.hidden_size, count, 1, bias=module.bias is not None,
            selection_bias=module.e_score_correction_bias is not None, device=like.device, dtype=like.dtype,
        )  # fmt: skip
    return Experts(
        module.hidden_size, module.intermediate_size, count, activation=module.activation, gated=module.gated,
        bias=module.down_proj_bias is not None, interleaved=module.interleaved, transposed=module.transposed,
        device=like.device, dtype=like.dtype,
    )  # fmt: skip


def _grow(
    experts: Experts, gate: Router, rows: Mapping[str, Tensor], of_gate: Mapping[str, Tensor], freeze_old: bool
) -> list[nn.Parameter]:
    """Appends the rows to the tensors of both modules. Returns their parameters that train."""
    old = experts.num_experts
    grown: list[tuple[Experts | Router, dict[str, Tensor]]] = [
        (module, {name: appended(tensor, new[name]) for name, tensor in _tensors(module).items()})
        for module, new in ((experts, rows), (gate, of_gate))
    ]
    for module, tensors in grown:  # everything is allocated
        for name, tensor in tensors.items():
            if name in module._parameters:
                flag = getattr(module, name).requires_grad
                module._parameters[name] = nn.Parameter(tensor, requires_grad=flag or freeze_old)
            else:
                module._buffers[name] = tensor
    experts.num_experts = gate.num_experts = len(next(experts.parameters()))
    gate.resize_counts(gate.num_experts)
    if not freeze_old:
        return [parameter for module, _ in grown for parameter in module._parameters.values() if parameter is not None]
    new_experts = torch.arange(old, experts.num_experts, dtype=torch.int32)
    return [
        parameter
        for module, tensors in grown
        for parameter in select(module, [name for name in tensors if name in module._parameters], new_experts)
    ]


def appended(old: Tensor, new: Tensor) -> Tensor:
    data = torch.empty(len(old) + len(new), *old.shape[1:], dtype=old.dtype, device=old.device)
    advise_huge_pages(data)
    data[: len(old)], data[len(old) :] = old.detach(), new
    return data
