# SPDX-License-Identifier: BSD-3-Clause
"""Site: a projection that can have an adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.adapters.lora_experts import LoRAExperts
from switchgear.experts import Experts
from switchgear.weights import Weight, advise_huge_pages, stored_of
from switchgear.weights.adapted import adapters_of
from switchgear.weights.form import hint_for
from switchgear.weights.state import extend, find, get_state, set_state
from switchgear.weights.weight import OffloadedWeight

TARGETS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Site:
    """A projection of all experts. It describes the module as it is now, so it is made anew for each use."""

    path: str  # the module's name in model.named_modules()
    module: nn.Module  # holds the parameter `name`, and its adapters
    name: str
    target: str  # the layer's first or second product, a name in TARGETS
    weight: Tensor | Weight | OffloadedWeight | Sequence[Tensor]  # [E,N,C], or E matrices [N,C]: views, or stored
    transposed: bool = False  # the parameter has [E,in,out], or [E·in,out]
    linears: tuple[str, ...] = ()  # paths of E linear layers below the module, if the weight is a list
    guarded: nn.Module | None = None  # the module that gets `guard`
    guard: Callable[..., None] | None = None  # a forward pre-hook that refuses a call of another implementation

    @property
    def where(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name

    @property
    def like(self) -> Tensor | Weight | OffloadedWeight:
        """What has the dtype and the device of the weight."""
        return self.weight if isinstance(self.weight, (Tensor, Weight, OffloadedWeight)) else self.weight[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, C)"""
        if isinstance(self.weight, (Tensor, Weight, OffloadedWeight)):
            experts, rows, cols = self.weight.shape
            return experts, rows, cols
        return len(self.weight), self.weight[0].shape[0], self.weight[0].shape[1]

    def adapter(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B."""
        return self.module.get_parameter(f"{self.name}_lora_A"), self.module.get_parameter(f"{self.name}_lora_B")


def find_sites(model: nn.Module) -> list[Site]:
    """The projections of a model that can have adapters, in the order of its modules."""
    sites: list[Site] = []
    for path, module in model.named_modules():
        sites += find_sites_at(path, module)
    if not sites:
        hint = hint_for(model)
        raise ValueError(f"model: expected routed experts, {type(model).__name__} has none ({hint})")
    return sites


def find_sites_at(path: str, module: nn.Module) -> list[Site]:
    """The projections of one module; empty if it has none that can have adapters."""
    return find("site", path, module) or []


def find_adapted_sites(model: nn.Module) -> list[Site]:
    """The projections of a model that have adapters, at least one."""
    if not any(map(adapters_of, model.modules())):
        for name, module in model.named_modules():
            if isinstance(module, LoRAExperts):
                module.merge(name)
    sites = [site for site in find_sites(model) if site.name in adapters_of(site.module)]
    if not sites:
        raise ValueError("model: expected adapters (add_lora, load_peft), got none")
    return sites


def guard(site: Site) -> None:
    """Lets the site's library refuse calls that would miss what switchgear adds to its weight."""
    if site.guarded is not None and site.guard is not None and get_state(site.guarded).guard is None:
        set_state(site.guarded, guard=site.guarded.register_forward_pre_hook(site.guard))


def unguard(module: nn.Module) -> None:
    if (handle := get_state(module).guard) is not None:
        set_state(module, guard=None)
        handle.remove()


def refuse_wrapped(path: str, module: nn.Module) -> None:
    """Raises ValueError for a module that another library has wrapped."""
    if path.rpartition(".")[2] == "base_layer":
        raise ValueError(
            f"{path}: expected experts without adapters of another library, got {type(module).__name__} in its wrapper"
        )


def _find_sites_of_experts(path: str, module: nn.Module) -> list[Site] | None:
    if not isinstance(module, Experts):
        return None
    refuse_wrapped(path, module)
    stored = stored_of(module)
    weights: Sequence[Any]
    if stored is not None:
        weights = stored.weights(module)
    else:
        weights = [getattr(module, name) for name in module._layout.names]
        weights = [weight.mT if module.transposed else weight for weight in weights]
    return [
        Site(path, module, name, target, weight, module.transposed)
        for name, target, weight in zip(module._layout.names, TARGETS, weights, strict=True)
    ]


extend("site", _find_sites_of_experts)


def list_local_experts(module: nn.Module, count: int) -> tuple[int, list[int]]:
    """The number of experts on all ranks, and those of this rank; count: of this rank, if experts are not
    distributed."""
    placement: Any = getattr(module, "placement", None)
    if placement is None:
        return count, list(range(count))
    return placement.num_experts, list(module._mine)  # type: ignore[arg-type]


def allocate(site: Site, *shape: int, dtype: torch.dtype | None) -> Tensor:
    """On huge pages: with weights in 4 bits, the page walks of one token would take as long as reading A and B."""
    tensor = torch.empty(*shape, dtype=dtype or site.like.dtype, device=site.like.device)
    advise_huge_pages(tensor)
    return tensor
