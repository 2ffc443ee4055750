# SPDX-License-Identifier: BSD-3-Clause
"""Decoder layers of transformers in a handful of kernel calls: norms, projections, rotary embeddings, attention over a
cache whose tokens are written in place, residuals, and the MoE block.

A layer runs so only while calling its parts would do nothing else; else its class's own forward runs. That is: no part
has hooks, adapters or another forward; the cache is a DynamicCache or a GrowingCache; the mask is causal, with a window
or padding; nothing compiles, traces or casts. With gradients the same functions run, differentiated, so that a
trainer's forward has the bits of generation: sums have one order for any batch, padding and cut of the prompt.

A class is in the table by its names, and a layer of it is replaced if both compute the same for random inputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchgear import ops
from switchgear.backends import in_autocast, runs_natively, warn_once
from switchgear.functional import AnyWeight, attend, linear, rms_norm, rotate_heads
from switchgear.functional.gradients import needs_autograd
from switchgear.integrations.cache import GrowingLayer, adopt_layer
from switchgear.integrations.forwards import (
    LINEAR,
    Bypassed,
    PartClass,
    check_call,
    get_part,
    name_model_class,
    replace_forward,
    runs_own_forward,
)
from switchgear.integrations.whole_blocks import run_block
from switchgear.layers.linear import StoredLinear
from switchgear.utils.modules import set_eval
from switchgear.weights import Weight
from switchgear.weights.module import matrix_of

_has_any_global_hook: Callable[[], bool] = nn.modules.module._has_any_global_hook


class LayerClass(NamedTuple):
    """A decoder layer of the usual form and its parts."""

    layer: PartClass
    attention: PartClass
    norm: PartClass
    block: str  # the name of the part after the second norm


def _name_classes(folder: str, name: str, block: str = "mlp") -> LayerClass:
    layer, attention, norm = (
        name_model_class(folder, name + part) for part in ("DecoderLayer", "Attention", "RMSNorm")
    )
    return LayerClass(layer, attention, norm, block)


LAYERS = (
    _name_classes("olmoe", "Olmoe"),
    _name_classes("qwen3_moe", "Qwen3Moe"),
    _name_classes("mixtral", "Mixtral"),
    _name_classes("gpt_oss", "GptOss"),
    _name_classes("granitemoe", "GraniteMoe", "block_sparse_moe"),
    _name_classes("glm4_moe", "Glm4Moe"),
    _name_classes("dots1", "Dots1"),
    _name_classes("qwen3_vl_moe", "Qwen3VLMoeText"),
    _name_classes("solar_open", "SolarOpen"),
)

# Arguments of a layer that change nothing here: hooks of transformers record what these ask for.
_IGNORED = {"use_cache", "cache_position", "output_hidden_states", "output_router_logits", "num_items_in_batch"}


def find_layer_class(layer: nn.Module) -> LayerClass | None:
    return next((known for known in LAYERS if known.layer.matches(type(layer))), None)


# ---- one layer -------------------------------------------------------------------------------------------------------


def _run_layer(
    layer: Any,
    known: LayerClass,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Any = None,
    past_key_values: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **others: Any,
) -> Tensor | None:
    """The layer's output, or None if its own forward has to run."""
    cache = past_key_values if cache is None else cache
    if position_embeddings is None or any(value for name, value in others.items() if name not in _IGNORED):
        return None
    if torch.compiler.is_compiling() or _has_any_global_hook() or in_autocast(hidden_states.device.type):
        return None
    if hidden_states.dim() != 3 or not hidden_states.is_cpu or not runs_natively(hidden_states.dtype):
        return None
    try:
        attention: Any = get_part(layer, "self_attn", known.attention)
        first: Any = get_part(layer, "input_layernorm", known.norm)
        second: Any = get_part(layer, "post_attention_layernorm", known.norm)
        q_proj, k_proj, v_proj, o_proj = (_read_linear(attention, f"{name}_proj") for name in "qkvo")
        norms = [_read_norm(attention, name, known.norm) for name in ("q_norm", "k_norm")]
    except Bypassed:
        return None
    weight = q_proj[0]
    if (isinstance(weight, Tensor) and weight.dtype is not hidden_states.dtype) or (
        layer.training and attention.attention_dropout > 0
    ):
        return None
    mask = _read_mask(attention, attention_mask, position_ids, hidden_states, cache)
    if mask is None:
        return None
    keeping: GrowingLayer | None = None
    if cache is not None:
        if needs_autograd(hidden_states, weight if isinstance(weight, Tensor) else None):
            return None
        if (keeping := adopt_layer(cache, attention.layer_idx)) is None:
            return None

    batch, count, _ = hidden_states.shape
    cos, sin = position_embeddings
    angles = min(cos.shape[-1], attention.head_dim) // (1 if _is_half(known) else 2)
    (q_weight, eps), (k_weight, _) = norms
    sinks = getattr(attention, "sinks", None)
    scale = getattr(layer, "residual_multiplier", 1.0)
    projections = q_proj, k_proj, v_proj, o_proj
    if keeping is not None and scale == 1 and (operands := _find_operands(hidden_states, keeping, projections)):
        keys, values = keeping.lengthen(count)
        y, residual = ops.attention_block_on_host(
            (hidden_states, first.weight, second.weight, *operands, q_weight, k_weight, cos, sin, mask.starts,
             None if sinks is None else sinks.float()),
            (angles, keeping.length, attention.scaling, mask.window or 0, first.variance_epsilon, eps,
             second.variance_epsilon),
            keys, values,
        )  # fmt: skip
        y, residual = y.view(hidden_states.shape), residual.view(hidden_states.shape)
    else:
        shape = batch, count, -1, attention.head_dim
        x = rms_norm(hidden_states, first.weight, first.variance_epsilon)
        q, k, v = (linear(x, *proj).view(shape) for proj in (q_proj, k_proj, v_proj))
        into = None if keeping is None else keeping.extend((k.transpose(1, 2), v.transpose(1, 2)), count)
        q, keys, values = rotate_heads(
            q, k, v, cos[..., :angles], sin[..., :angles], q_weight=q_weight, k_weight=k_weight, eps=eps, into=into
        )
        if keeping is not None:
            keys, values = keeping.memory  # type: ignore[misc]
        attended = attend(
            q,
            keys,
            values,
            scale=attention.scaling,
            length=count if keeping is None else keeping.length,
            window=mask.window,
            starts=mask.starts,
            sinks=sinks,
        )
        out = linear(attended.flatten(2), *o_proj)
        y, residual = rms_norm(
            out if scale == 1 else out * scale, second.weight, second.variance_epsilon, residual=hidden_states
        )
    y = run_block(layer._modules[known.block], y)
    mixed: Tensor = y[0] if isinstance(y, tuple) else y
    total: Tensor = residual + (mixed if scale == 1 else mixed * scale)
    return total


def _find_operands(x: Tensor, keeping: GrowingLayer, projections: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What the kernels read of projections: the tensors, the form and the bias of each. None if not all can be read in
    one call: a gradient or a dispatcher sees the ops, or the cache has no memory yet."""
    if torch.is_grad_enabled() or keeping.memory is None or not ops.needs_no_dispatch(x) or not x.is_contiguous():
        return None
    found: list[Any] = []
    for weight, bias in projections:
        if type(weight) is nn.Parameter:
            found += (weight, (), bias)
        elif type(weight) is Weight and (operand := weight.direct_operand()) is not None:
            found += (operand.tensors, operand.form, bias)
        else:
            return None
    return tuple(found)


def _is_half(known: LayerClass) -> bool:
    """Whether cos and sin have an element per angle; else each angle twice."""
    return known.layer.name == "GptOssDecoderLayer"


def _read_linear(module: nn.Module, name: str) -> tuple[AnyWeight, Tensor | None]:
    part: Any = module._modules[name]
    if type(part) is StoredLinear:
        check_call(part, name)
        return matrix_of(part), part.bias
    part = get_part(module, name, LINEAR)
    return part.weight, part.bias


def _read_norm(module: nn.Module, name: str, known: PartClass) -> tuple[Tensor | None, float]:
    if module._modules.get(name) is None:
        return None, 1e-6
    part: Any = get_part(module, name, known)
    return part.weight, part.variance_epsilon


# ---- masks -----------------------------------------------------------------------------------------------------------


class Mask(NamedTuple):
    """What a token sees: the window tokens up to itself, from its sequence's start on."""

    starts: Tensor | None  # [B] int32, indices of the cache
    window: int | None


_last: tuple[Any, tuple[Any, Mask | None] | None] = (lambda: None, None)  # the layers of a model share a mask


def _read_mask(
    attention: Any, mask: Tensor | None, position_ids: Tensor | None, hidden_states: Tensor, cache: Any
) -> Mask | None:
    """The meaning of a mask, or None if it is another one."""
    global _last
    if attention.config._attn_implementation not in ("sdpa", "eager"):
        return None
    window = _find_window(attention)
    if mask is None:
        is_eager = attention.config._attn_implementation == "eager"
        return Mask(None, window) if not is_eager else None  # eager attention without a mask is not causal
    if type(mask) is not Tensor or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != hidden_states.shape[1]:
        return None
    key = window, mask.shape, None if mask.is_inference() else mask._version  # it may be written to
    kept, found = _last
    if kept() is not mask or found is None or found[0] != key:
        found = key, _find_mask(mask, position_ids, window)
        _last = weakref.ref(mask), found
    return found[1]


def _find_window(attention: Any) -> int | None:
    window = getattr(attention, "sliding_window", None)
    if window is None and not hasattr(attention, "sliding_window"):
        window = getattr(attention.config, "sliding_window", None)
    return window


def _find_mask(mask: Tensor, position_ids: Tensor | None, window: int | None) -> Mask | None:
    batch, _, count, length = mask.shape
    if mask.dtype is torch.bool:
        sees = mask[:, 0]
    else:
        sees = mask[:, 0] == 0
        if not bool((sees | (mask[:, 0] <= torch.finfo(mask.dtype).min)).all()):
            return None
    position = torch.arange(length, device=mask.device)
    own = position[length - count :, None]
    is_real = sees.gather(2, own.expand(batch, count, 1))  # [B,T,1]; rows of padding may see anything
    first = sees[:, -1].int().argmax(-1)
    candidates = [torch.zeros_like(first), first]  # a window hides where a sequence starts
    if position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] == count:
        row = is_real.int().argmax(1)  # [B,1], the first
        candidates.insert(0, (own[row, 0] - position_ids.expand(batch, -1).gather(1, row))[:, 0])
    found = torch.full_like(first, -length - 1)
    for starts in candidates:
        wanted = (position >= starts[:, None, None]) & (position <= own)
        if window is not None:
            wanted = wanted & (position > own - window)
        is_right = ((sees == wanted) | ~is_real).flatten(1).all(-1)
        found = torch.where((found < -length) & is_right, starts, found)
    if bool((found < -length).any()):
        return None
    return Mask(found.int() if bool(found.any()) else None, window)


# ---- replacing -------------------------------------------------------------------------------------------------------


def run_whole_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Callable[[], None]]]:
    """Replaces the forward of each layer that is known, and of the norm after them: yields (name, module, undo)."""
    tried: dict[Any, bool] = {}  # layers of a class may differ in plain values, as of a window
    replaced: set[type] = set()
    for name, module in model.named_modules():
        known = find_layer_class(module)
        if known is None or not runs_own_forward(module):
            continue
        kind = type(module)
        key = kind, _list_values(module), _list_values(module._modules["self_attn"])
        if key not in tried:
            difference = _find_difference(module, known, _find_rotary(model, name))
            tried[key] = difference is None
            if difference is not None:
                warn_once(f"{kind.__name__} is left alone, it does not compute what switchgear expects: {difference}")
        if tried[key]:
            replaced.add(kind)
            yield name, module, replace_forward(module, _build_forward(known, kind.forward))
    for name, module in model.named_modules():
        norm: Any = module._modules.get("norm")
        layers: Any = module._modules.get("layers")
        if norm is None or not isinstance(layers, nn.ModuleList) or not len(layers) or type(layers[0]) not in replaced:
            continue
        known = find_layer_class(layers[0])
        if known is not None and known.norm.matches(type(norm)) and runs_own_forward(norm):
            yield f"{name}.norm".lstrip("."), norm, replace_forward(norm, _build_norm(type(norm).forward))


def _list_values(module: Any) -> frozenset[tuple[str, Any]]:
    plain = (int, float, bool, str, type(None))
    return frozenset((k, v) for k, v in vars(module).items() if type(v) in plain and k not in ("layer_idx", "training"))


def _build_forward(known: LayerClass, own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and type(self).forward is own:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                return type(self).forward(self, hidden_states, **kwargs)
            out = _run_layer(self, known, hidden_states, **kwargs)
            if out is not None:
                return out
        return type(self).forward(self, hidden_states, *args, **kwargs)

    return forward


def _build_norm(own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        is_plain = type(self).forward is own and type(hidden_states) is Tensor and hidden_states.is_cpu
        if (
            not is_plain
            or torch.compiler.is_compiling()
            or in_autocast("cpu")
            or not runs_natively(hidden_states.dtype)
        ):
            return type(self).forward(self, hidden_states)  # type: ignore[no-any-return]
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[no-any-return]

    return forward


# ---- the trial -------------------------------------------------------------------------------------------------------

_TOKENS = 12


def _find_rotary(model: nn.Module, layer: str) -> Any:
    """The module beside the list of layers that computes cos and sin."""
    owner: Any = model.get_submodule(layer.rpartition(".")[0].rpartition(".")[0])
    return getattr(owner, "rotary_emb", None)


@torch.no_grad()
def _find_difference(layer: Any, known: LayerClass, rotary: Any) -> str | None:
    """Runs both on the same random rows. Returns how they differ, or None."""
    if rotary is None:
        return "no rotary_emb beside the layers"
    weight = layer.input_layernorm.weight
    if weight.is_meta:
        return None  # nothing to compare yet
    dtype = getattr(layer.self_attn.q_proj.weight, "dtype", weight.dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, _TOKENS, weight.shape[0], generator=generator).to(weight.device, dtype)
    position_ids = torch.arange(_TOKENS, device=x.device)[None]
    position = position_ids[0]
    sees = position <= position[:, None]
    if (window := _find_window(layer.self_attn)) is not None:
        sees = sees & (position > position[:, None] - window)
    mask: Any = sees[None, None].expand(2, 1, -1, -1)
    if layer.self_attn.config._attn_implementation == "eager":
        mask = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
    try:
        with set_eval(layer):
            angles = rotary(x, position_ids)
            arguments = {"position_embeddings": angles, "attention_mask": mask, "position_ids": position_ids}
            want = type(layer).forward(layer, x, **arguments)
            got = _run_layer(layer, known, x, **arguments)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    if got is None:
        return "a part has hooks, adapters or another class"
    want, got = (y[0] if isinstance(y, tuple) else y for y in (want, got))
    if not bool(want.isfinite().all()):
        return None  # weights that are not finite compare with nothing
    # Both round at a dozen places in the layer's dtype; a layer with another meaning differs by the size of its terms.
    added, expected = (y.float() - x.float() for y in (got, want))
    bound = 32 * torch.finfo(x.dtype).eps * (x.float().abs().max() + expected.abs().max())
    difference = (added - expected).abs().max()
    return None if difference <= bound else f"difference {difference:.1e} of {expected.abs().max():.1e}"
