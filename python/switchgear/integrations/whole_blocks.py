# SPDX-License-Identifier: BSD-3-Clause
"""Whole MoE blocks of transformers: router, choice and experts without a call of either module.

For small models the Python code of a block costs more than its kernels; for all models it does when it first runs
after the weights have evicted it from the caches. So a block of a known class goes from its input to `gate_route` and
`moe` directly. It does so only while calling its submodules would do nothing else: without hooks, replaced forwards or
traces. Otherwise the class's own forward runs.

The router's logits are sums of our own order, so they may differ from torch's in the last bit, and a choice between
experts whose logits are that close may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from switchgear import ops
from switchgear.backends import in_autocast
from switchgear.functional import gate_route
from switchgear.functional.gradients import is_transformed, needs_autograd
from switchgear.integrations.experts import find_unreadable, run_fused
from switchgear.integrations.forwards import (
    Bypassed,
    PartClass,
    get_part,
    has_hooks,
    name_model_class,
    replace_forward,
    runs_own_forward,
)
from switchgear.integrations.gates import find_gate
from switchgear.integrations.linears import multiply
from switchgear.integrations.modules import NAME, weights_in
from switchgear.weights import Weight

_has_any_global_hook: Callable[[], bool] = nn.modules.module._has_any_global_hook


class BlockClass(NamedTuple):
    """A block and its parts, how the router chooses, and what is done to its weights."""

    block: PartClass
    router: PartClass
    experts: PartClass
    options: Callable[[Any], dict[str, Any]]  # of gate_route, for a router
    rounds: bool  # weights to the dtype of the logits
    router_name: str = "gate"
    shared: str | None = None  # the part whose output is added
    returns_weights: bool = False  # beside its output


def _name_classes(
    folder: str, name: str, options: Callable[[Any], dict[str, Any]], rounds: bool, block: str = "SparseMoeBlock",
    router: str = "TopKRouter", router_name: str = "gate", shared: str | None = None, returns_weights: bool = False,
) -> BlockClass:  # fmt: skip
    own, of_router, experts = (name_model_class(folder, name + part) for part in (block, router, "Experts"))
    return BlockClass(own, of_router, experts, options, rounds, router_name, shared, returns_weights)


def _choose_by_softmax(router: Any) -> dict[str, Any]:
    return {"normalize": router.norm_topk_prob}


def _choose_by_logits(router: Any) -> dict[str, Any]:
    """A softmax over the chosen logits: that over all, normalised."""
    return {"normalize": True, "bias": getattr(router, "bias", None)}


def _choose_by_groups(router: Any) -> dict[str, Any]:
    return {
        "score_function": "sigmoid", "normalize": router.norm_topk_prob, "scale": router.routed_scaling_factor,
        "selection_bias": router.e_score_correction_bias, "num_groups": router.num_group,
        "topk_groups": router.topk_group, "group_score": "top2_sum",
    }  # fmt: skip


BLOCKS = (
    _name_classes("olmoe", "Olmoe", _choose_by_softmax, True),
    _name_classes("qwen3_moe", "Qwen3Moe", _choose_by_softmax, True),
    _name_classes("mixtral", "Mixtral", lambda _: {"normalize": True}, False),
    _name_classes("gpt_oss", "GptOss", _choose_by_logits, True, "MLP", router_name="router", returns_weights=True),
    _name_classes("granitemoe", "GraniteMoe", _choose_by_logits, True, "MoE", router_name="router"),
    _name_classes("qwen3_vl_moe", "Qwen3VLMoeText", lambda _: {"normalize": True}, True),
    *(
        _name_classes(folder, name, _choose_by_groups, False, "MoE", "TopkRouter", shared="shared_experts")
        for folder, name in (
            ("glm4_moe", "Glm4Moe"),
            ("dots1", "Dots1"),
            ("solar_open", "SolarOpen"),
            ("deepseek_v3", "DeepseekV3"),
            ("glm4_moe_lite", "Glm4MoeLite"),
            ("glm4v_moe", "Glm4vMoeText"),
        )
    ),
)


def find_block_class(block: nn.Module) -> BlockClass | None:
    return next((known for known in BLOCKS if known.block.matches(type(block))), None)


def run_as_whole(block: nn.Module) -> Callable[[], None] | None:
    """Lets a block run as a whole where it can, and returns an undo function; None if its class is not known, or its
    forward was replaced before."""
    known, own = find_block_class(block), type(block).forward
    if known is None or known.returns_weights or not runs_own_forward(block):
        return None

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        is_ours = type(self).forward is own
        y = _run_whole(self, known, hidden_states, with_gradients=False) if is_ours else None
        return type(self).forward(self, hidden_states) if y is None else y

    forward.runs_whole = True  # type: ignore[attr-defined]
    return replace_forward(block, forward)


def _runs_ours(block: Any) -> bool:
    """Whether a call of the block does no more than the forward of its class, or ours in its place."""
    forward = vars(block).get("forward")
    return (forward is None or hasattr(getattr(forward, "__func__", None), "runs_whole")) and not has_hooks(block)


def _find_parts(block: Any, known: BlockClass) -> tuple[Any, Any] | None:
    """The router and the experts, if calls of both may be left out."""
    try:
        router: Any = get_part(block, known.router_name, known.router)
        experts: Any = get_part(block, "experts", known.experts)
    except Bypassed:
        return None
    return (router, experts) if experts.config._experts_implementation == NAME else None


def run_block(block: Any, hidden_states: Tensor) -> Any:
    """A block's output, as a whole if it can, with gradients too; else by its own code."""
    if _runs_ours(block) and (known := find_block_class(block)) is not None:
        y = _run_whole(block, known, hidden_states, with_gradients=True)
        if y is not None:
            return y
    with RowFunctions():
        return block(hidden_states)


def _run_whole(block: Any, known: BlockClass, hidden_states: Tensor, with_gradients: bool) -> Tensor | None:
    """The block's output, or None if its own forward has to run."""
    if torch.compiler.is_compiling() or _has_any_global_hook() or in_autocast(hidden_states.device.type):
        return None
    if block.training and getattr(block, "jitter_noise", 0.0) > 0:
        return None
    if (parts := _find_parts(block, known)) is None:
        return None
    router, experts = parts
    weight = router.weight
    x = hidden_states.view(-1, hidden_states.shape[-1])
    is_differentiated = needs_autograd(x, weight)
    if (is_differentiated and (not with_gradients or is_transformed())) or not ops.needs_no_dispatch(x, weight):
        return None
    options = known.options(router)
    is_wide = weight.dtype is torch.float32 and x.dtype is not torch.float32
    if weight.dtype is not x.dtype and not (is_wide and options.get("score_function") == "sigmoid"):
        return None
    weights, gate = weights_in(experts), find_gate(experts)
    if gate is None or find_unreadable(weights) is not None:
        return None
    chosen = gate_route(x, weight, router.top_k, float32=is_wide, **options)
    topk_weights = chosen.topk_weights
    if known.rounds and x.dtype is not torch.float32:
        topk_weights = topk_weights.to(x.dtype)
    y = run_fused(x, chosen.topk_ids, topk_weights, weights, gate).view(hidden_states.shape)
    return y if known.shared is None else y + block._modules[known.shared](hidden_states)


def find_operands(block: Any, x: Tensor) -> tuple[Any, ...] | None:
    """What `_run_whole` passes to the kernels for an x like this one: (tensors of the router, fields of Layer without
    choices, options of a choice), as DecoderLayerArgs has them. None if the block adds or converts something."""
    known = find_block_class(block)
    if known is None or known.shared is not None or not _runs_ours(block) or block.training:
        return None
    if (parts := _find_parts(block, known)) is None or (gate := find_gate(parts[1])) is None:
        return None
    router, experts = parts
    weights, options = weights_in(experts), known.options(router)
    projections = [_find_operand(weight, x.dtype) for weight in weights[:2]]
    tensors = (router.weight, options.pop("bias", None), options.pop("selection_bias", None))
    others = [t for t in (*tensors, *weights[2:]) if t is not None]
    if None in projections or not all(type(t) is nn.Parameter and t.is_contiguous() for t in others):
        return None
    if any(t.dtype is not x.dtype for t in others) or (known.rounds and x.dtype is torch.float16):
        return None
    first: Any
    second: Any
    first, second = projections
    choice = RouteOptions(**options)
    return (
        tensors,
        (*first, *second, *weights[2:], None, None, *gate, None, None, None, ()),
        (*choice, router.top_k, known.rounds),
    )


class RouteOptions(NamedTuple):
    """Those of gate_route, in the order of its op."""

    score_function: str = "softmax"
    normalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    group_score: str = "max"


def _find_operand(weight: Any, dtype: torch.dtype) -> tuple[Any, tuple[int, ...]] | None:
    """The tensors and the form of a projection that is multiplied as it is, and not a view, which a parameter with new
    data would leave behind."""
    if type(weight) is nn.Parameter:
        return (weight, ()) if weight.dtype is dtype and 1 in weight.stride()[-2:] else None
    if type(weight) is Weight and (operand := weight.direct_operand(dtype)) is not None:
        return operand.tensors, operand.form
    return None


# ---- blocks that run their own code ----------------------------------------------------------------------------------

# torch computes the last numbers of a tensor, and of each thread's share, by other instructions than the rest.
_FUNCTIONS = {
    getattr(place, name)
    for name in ("sigmoid", "silu", "gelu", "tanh", "exp", "softplus", "elu", "selu", "mish")
    for place in (torch, Tensor, F)
    if hasattr(place, name)
}
_WHOLE = 64  # numbers: what two vectors of any instruction set divide
_SHARE = 32_768 - _WHOLE  # fewer than torch gives to a second thread


class RowFunctions(TorchFunctionMode):
    """Inside, the products and functions of a row have the same bits in any batch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            out = _multiply(*args, **kwargs)
            if out is not None:
                return out
        elif func in _FUNCTIONS and args and (args[0].numel() % _WHOLE or args[0].numel() > _SHARE):
            return _apply_in_shares(func, *args, **kwargs)
        return func(*args, **kwargs)


def _multiply(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    return multiply(input, weight, bias)


def _apply_in_shares(func: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if kwargs.pop("inplace", False) or x.numel() == 0:
        return x.copy_(_apply_in_shares(func, x, *args, **kwargs)) if x.numel() else x
    flat = F.pad(x.reshape(-1), (0, -x.numel() % _WHOLE))
    shares = [func(share, *args, **kwargs) for share in torch.split(flat, _SHARE)]
    return torch.cat(shares)[: x.numel()].view(x.shape)
