# SPDX-License-Identifier: BSD-3-Clause
"""Weights in panels: the order in which the kernels of the CPU read them, for inference.

Weights in torch's order are transposed in registers, or copied into panels, at each call. Panels are read as they are,
at the rate of memory, and lie on huge pages. A panel is `panel` rows of a projection [E,N,C] stored as [C/d, panel, d],
d elements in 4 bytes; which panels there are depends on dtype and instruction set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchgear import ops
from switchgear.pages import advise_huge_pages
from switchgear.reference import from_panels


class Layout(NamedTuple):
    """What there is to pack in a module of experts."""

    names: tuple[str, str]  # of the parameters: the first projection, the second
    transposed: bool  # they are [E,in,out] instead of [E,out,in]
    split_gates: bool  # the first holds all gates, then all ups


@dataclass(frozen=True)
class Panels:
    """The packed projections of a module, in place of its parameters, which are empty meanwhile."""

    panel: int
    layout: Layout
    first: Tensor  # [E,N,H]
    second: Tensor  # [E,H,I]


FINDERS: list[Callable[[nn.Module], Layout | None]] = []  # each knows a kind of module


def panels_of(module: nn.Module) -> Panels | None:
    """What `pack_weights` made of a module's projections, None where they are plain."""
    return vars(module).get("_switchgear_panels")


def pack_weights(model: nn.Module) -> int:
    """Stores the experts' projections in the order in which the kernels of the CPU read them; for inference.

    Decoding then reads weights at the rate of memory, and medium batches save what copying panels costs. The state dict
    keeps the plain weights under their names, loading packs, `unpack_weights` takes it all back. Meanwhile the
    parameters themselves are empty, so they cannot train, move to another device or change dtype. While a projection is
    packed it is in memory twice.

    Args:
        model: has `Experts`, or experts of transformers that run on the fused kernel (`accelerate`).

    Returns the number of experts modules that are in panels now. Modules whose sizes do not divide into panels stay
    plain.

    Raises:
        ValueError: there is nothing to pack, with the reason.
    """
    packed, reason = 0, f"{type(model).__name__} has no experts that run on the fused kernel"
    for module in model.modules():
        layout = next((layout for find in FINDERS if (layout := find(module)) is not None), None)
        if panels_of(module) is not None:
            packed += 1
        elif layout is not None:
            obstacle = _obstacle(module, layout)
            if obstacle is None:
                _pack(module, layout)
                packed += 1
            else:
                reason = obstacle
    if not packed:
        raise ValueError(f"model: expected experts that can be packed; {reason}")
    return packed


def unpack_weights(model: nn.Module) -> int:
    """Takes `pack_weights` back: the parameters hold their weights again. Returns the number of modules it changed."""
    changed = 0
    for module in model.modules():
        if (panels := panels_of(module)) is not None:
            for name, weight in zip(panels.layout.names, (panels.first, panels.second), strict=True):
                getattr(module, name).data = _plain(weight, panels)
            module._switchgear_panels = None  # type: ignore[assignment]
            changed += 1
    return changed


# ---- a projection ----------------------------------------------------------------------------------------------------


def to_panels(weight: Tensor, panel: int) -> Tensor:
    """weight [E,N,C], any strides, in panels: [E,N,C], contiguous. N is a multiple of `panel`, C of 4 bytes."""
    num_experts, rows, columns = weight.shape
    depth = 4 // weight.element_size()
    packed = torch.empty(num_experts, rows // panel, columns // depth, panel, depth, dtype=weight.dtype)
    advise_huge_pages(packed)
    packed.copy_(weight.reshape(num_experts, rows // panel, panel, columns // depth, depth).transpose(2, 3))
    return packed.view(weight.shape)


def _plain(weight: Tensor, panels: Panels) -> Tensor:
    plain = from_panels(weight, panels.panel)
    return plain.mT.contiguous() if panels.layout.transposed else plain


# ---- a module --------------------------------------------------------------------------------------------------------


def _obstacle(module: nn.Module, layout: Layout) -> str | None:
    """Why a module cannot be packed."""
    first, second = (getattr(module, name) for name in layout.names)
    if first.device.type != "cpu":
        return f"{layout.names[0]} is on {first.device}, and panels are for the CPU"
    panel = ops.panel(first.dtype)
    if panel == 0:
        return f"{ops.cpu_isa()} has no panels of {first.dtype}"
    if layout.transposed:
        first, second = first.mT, second.mT
    rows, depth = (first.shape[1] // (2 if layout.split_gates else 1), second.shape[1]), 4 // first.element_size()
    if any(size % panel for size in rows) or any(weight.shape[2] % depth for weight in (first, second)):
        return f"sizes {list(first.shape)} and {list(second.shape)} do not divide into panels of {panel} x {depth}"
    return None


def _pack(module: nn.Module, layout: Layout) -> None:
    weights = [getattr(module, name) for name in layout.names]
    panel = ops.panel(weights[0].dtype)
    packed = []
    for weight in weights:
        data = weight.detach()
        packed.append(to_panels(data.mT if layout.transposed else data, panel))
        weight.data = data.new_empty(0)
    if "_switchgear_panels" not in vars(module):  # the hooks do nothing while a module is plain
        module.register_state_dict_post_hook(_save_plain)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(_load_plain)  # type: ignore[no-untyped-call]
    module._switchgear_panels = Panels(panel, layout, *packed)  # type: ignore[assignment]


def _save_plain(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if (panels := panels_of(module)) is not None:
        for name, weight in zip(panels.layout.names, (panels.first, panels.second), strict=True):
            if prefix + name in state_dict:
                state_dict[prefix + name] = _plain(weight, panels)


def _load_plain(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if (panels := panels_of(module)) is not None:
        for name, weight in zip(panels.layout.names, (panels.first, panels.second), strict=True):
            plain = state_dict.get(prefix + name)
            expected = weight.mT.shape if panels.layout.transposed else weight.shape
            if plain is not None and plain.shape == expected:  # load_state_dict complains about any other shape
                plain = plain.to(weight.dtype)
                weight.copy_(to_panels(plain.mT if panels.layout.transposed else plain, panels.panel))
                state_dict[prefix + name] = weight.new_empty(0)
