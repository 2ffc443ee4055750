# SPDX-License-Identifier: BSD-3-Clause
"""Low-rank adapters of a module's projections: where their state is, and how the projections are read with them.

Own adapters, of `switchgear.adapters`, are the parameters <name>_lora_A [E,r,in] and <name>_lora_B [E,out,r] of the
module that holds the parameter <name>; their options are in the module's State. Borrowed factors belong to another
library's wrapper of the module, which lends them for the duration of a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.utils.modules import is_extended
from switchgear.weights.state import FINDERS, Borrowed, Factors, Lora, get_state
from switchgear.weights.weight import AdaptedWeight, Weight


def notice_wrappers() -> None:
    """Lets libraries of wrappers know switchgear from now on, if they are imported."""
    for notice in FINDERS["wrapper"]:
        notice()


def notice_wrapper(module: nn.Module) -> None:
    """Notices a wrapper that computes the module's parameters, since it does not know yet that it could lend."""
    if "parametrizations" in module._modules:
        notice_wrappers()


def can_borrow_from(wrapper: nn.Module) -> bool:
    """Whether a wrapper lends its factors to modules that run on switchgear."""
    notice_wrappers()
    return is_extended(getattr(type(wrapper), "_activate_lora", None))


def adapters_of(module: nn.Module) -> Mapping[str, Lora]:
    """A module's own adapters by projection."""
    return get_state(module).adapters


def has_adapters(module: nn.Module) -> bool:
    """Whether a module has adapters, own or borrowed, that reading its parameters would miss."""
    state = get_state(module)
    return bool(state.borrowed) or any(lora.merged is None for lora in state.adapters.values())


def read_by(module: nn.Module) -> list[Tensor]:
    """The tensors with gradients that a call of the module may read: its parameters, and borrowed factors."""
    borrowed = [factor for factors in get_state(module).borrowed.values() for factor in factors]
    return [*module.parameters(), *(tensor for factor in borrowed for tensor in factor[:2])]


def adapted(
    module: nn.Module, name: str, weight: Any, *, transposed: bool = False, borrowed: Borrowed | None = None
) -> Any:
    """`weight`, the projection [E,N,C] read from the module's parameter `name`, with its adapters, if any.

    transposed: `weight` is the parameter's last dimensions swapped. borrowed: factors that a caller found itself.
    """
    state = get_state(module)
    borrowed = state.borrowed if borrowed is None else borrowed
    if not state.adapters and not borrowed:
        notice_wrapper(module)
        return weight
    lora = state.adapters.get(name)
    factors = borrowed.get(name, ())
    if lora is not None and lora.merged is None:
        if factors:
            raise ValueError(
                f"{name}: expected adapters of one library, got some of switchgear.adapters.add_lora and of a wrapper"
            )
        return _with_own(module, name, weight, lora)
    return _with_borrowed(weight, factors, transposed) if factors else weight


def _with_own(module: nn.Module, name: str, weight: Any, lora: Lora) -> AdaptedWeight:
    parameters = module._parameters
    a, b = parameters[f"{name}_lora_A"], parameters[f"{name}_lora_B"]
    assert a is not None
    assert b is not None
    plain = weight[0] if isinstance(weight, list) else weight
    if isinstance(plain, Tensor) and a.dtype is not plain.dtype:
        a, b = a.to(plain.dtype), b.to(plain.dtype)  # type: ignore[assignment]
    return AdaptedWeight(weight, a, b, lora.scale, dropout=lora.dropout if module.training else 0.0)


def _with_borrowed(weight: Tensor | Weight, factors: Sequence[Factors], transposed: bool) -> AdaptedWeight:
    """Several adapters are one of the sum of their ranks."""
    pairs = [_pair(weight, factor, transposed) for factor in factors]
    scales = [factor.scale for factor in factors]
    if len(pairs) == 1:
        return AdaptedWeight(weight, *pairs[0], scales[0])
    a = torch.cat([a for a, _ in pairs], 1)
    if len(set(scales)) == 1:
        return AdaptedWeight(weight, a, torch.cat([b for _, b in pairs], 2), scales[0])
    scaled = [b * scale for (_, b), scale in zip(pairs, scales, strict=True)]
    return AdaptedWeight(weight, a, torch.cat(scaled, 2), 1.0)


def _pair(weight: Tensor | Weight, factors: Factors, transposed: bool) -> tuple[Tensor, Tensor]:
    """a [E,r,C] and b [E,N,r] in the dtype of the weight: views, unless neither rows nor columns are contiguous."""
    count = weight.shape[0]
    left, right = factors.left, factors.right
    if left.dim() == 2:  # one factor of a parameter that holds the experts one below the other
        left, right = left.view(count, -1, left.shape[1]), right.expand(count, *right.shape)
    left, right = left[:count].to(weight.dtype), right[:count].to(weight.dtype)
    left, right = (t if 1 in t.stride()[-2:] else t.contiguous() for t in (left, right))
    return (left.mT, right.mT) if transposed else (right, left)
