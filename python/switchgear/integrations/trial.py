# SPDX-License-Identifier: BSD-3-Clause
"""A trial of an entry of `undecorated.PATCHES` on eight random tokens: does it compute what the class computes?"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switchgear.integrations.experts import list_tensors
from switchgear.utils.modules import set_eval

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
TOKENS = 8


def _get_dtype_and_device(module: Any) -> dict[str, Any]:
    parameter = next(module.parameters())
    return {"dtype": parameter.dtype, "device": parameter.device}


def _draw_x(module: Any, generator: torch.Generator, width: int) -> Tensor:
    return torch.randn(TOKENS, width, generator=generator).to(**_get_dtype_and_device(module))


def _draw_choices(module: Any, generator: torch.Generator, num_experts: int) -> tuple[Tensor, Tensor]:
    """Two distinct experts per token (one if there is one), with weights in (0, 1)."""
    scores = torch.rand(TOKENS, num_experts, generator=generator)
    topk_weights, topk_ids = scores.topk(min(2, num_experts), dim=-1)
    return topk_ids.to(_get_dtype_and_device(module)["device"]), topk_weights.to(**_get_dtype_and_device(module))


def topk(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    x = _draw_x(module, generator, module.gate_up_proj.shape[-1])
    return x, *_draw_choices(module, generator, module.num_experts)


def longcat(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    x = _draw_x(module, generator, module.hidden_size)
    return x, *_draw_choices(module, generator, module.total_experts)


def dbrx(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    x = _draw_x(module, generator, module.hidden_size)
    return x[None], *_draw_choices(module, generator, module.num_experts)


def llama4(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    return (_draw_x(module, generator, module.hidden_dim),)


def jetmoe(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    return (_draw_x(module, generator, module.input_size)[None],)


def jetmoe_linear(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    ids = torch.randint(module.num_experts, (TOKENS,), generator=generator)
    expert_size = torch.bincount(ids, minlength=module.num_experts).tolist()
    return _draw_x(module, generator, module.input_size), expert_size


def switch(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    x = _draw_x(module, generator, module["expert_0"].wi.in_features)
    ids, topk_weights = _draw_choices(module, generator, module.num_experts)
    selected = F.one_hot(ids[:, :1], module.num_experts)
    selected[0] = 0  # a token past capacity
    return x, selected, topk_weights[:, :1]


def nllb(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    x = _draw_x(module, generator, module["expert_0"].fc1.in_features)
    ids, topk_weights = _draw_choices(module, generator, module.num_experts)
    router_probs = topk_weights.new_zeros(TOKENS, module.num_experts).scatter(1, ids, topk_weights)
    return x, F.one_hot(ids[:, 0], module.num_experts), router_probs


def vitpose(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    x = _draw_x(module, generator, module[0].in_features)
    indices = torch.randint(module.num_experts, (2, 1, 1), generator=generator)
    return x.view(2, TOKENS // 2, -1), indices.to(x.device)


# ---- the trial -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def find_difference(module: nn.Module, patch: Any, weights: Any) -> str | None:
    """Runs the class's forward and the Patch on the same random rows. Returns how they differ, or None."""
    leaves = list_tensors(weights)
    if any(leaf.is_meta for leaf in leaves):
        return None  # nothing to compare yet
    arguments = patch.sample(module, torch.Generator().manual_seed(0))
    try:
        with _set_hooks_aside(module):
            want = _get_tensor(type(module).forward(module, *arguments))
            got = _get_tensor(patch.forward(module, weights, *arguments))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    if not bool(want.isfinite().all()):
        return None  # weights that are not finite compare with nothing
    # Tolerance: a few roundings to the storage dtype, and sums of `length` float32 products in another order (a random
    # walk of half ulps). A patch with another meaning differs by the size of the value itself.
    length = max(leaf.shape[-1] for leaf in leaves)
    relative = 16 * torch.finfo(want.dtype).eps + 4 * length**0.5 * torch.finfo(torch.float32).eps
    bound = relative * want.abs().max()
    difference = (got - want).abs().max()
    return None if difference <= bound else f"difference {difference:.1e} of {want.abs().max():.1e}"  # NaN differs


@contextmanager
def _set_hooks_aside(module: nn.Module) -> Iterator[None]:
    """Without dropout, and without hooks of parts, which belong to the model's own calls."""
    before = [(part, name, getattr(part, name)) for part in module.modules() for name in _HOOKS]
    try:
        for part, name, _ in before:
            setattr(part, name, OrderedDict())
        with set_eval(module):
            yield
    finally:
        for part, name, hooks in before:
            setattr(part, name, hooks)


def _get_tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
