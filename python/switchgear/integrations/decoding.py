# SPDX-License-Identifier: BSD-3-Clause
"""Decoder layers of transformers in a handful of kernel calls: norms, projections, rotary embeddings, attention over a
cache whose tokens are written in place, residuals, and the MoE block.

A layer runs so only while calling its parts would do nothing else; else its class's own forward runs. That is: no part
has hooks, adapters or another forward; the cache is a DynamicCache or a GrowingCache; the mask is causal, with a window
or padding; nothing compiles, traces or casts. With gradients the same functions run, differentiated, so that a
trainer's forward has the bits of generation: sums have one order for any batch, padding and cut of the prompt.

A layer is described by its parts (layer_classes.py), and replaced if it computes the same as its class's forward for
random inputs (layer_trials.py).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from switchgear import ops
from switchgear.backends import in_autocast, runs_natively, warn_once
from switchgear.functional import AnyWeight, attend, linear, rms_norm, rotate_heads
from switchgear.functional.gradients import needs_autograd
from switchgear.integrations.cache import GrowingLayer, adopt_layer, begins
from switchgear.integrations.forwards import (
    LINEAR,
    Bypassed,
    PartClass,
    check_call,
    get_part,
    has_hooks,
    replace_forward,
    runs_own_forward,
)
from switchgear.integrations.layer_calls import Ahead, LayerCall, read_window
from switchgear.integrations.layer_classes import LayerClass, find_class, find_layer_class
from switchgear.integrations.layer_trials import divides_by_root_mean_square, find_difference, find_form
from switchgear.integrations.whole_blocks import find_operands, run_block
from switchgear.layers.linear import StoredLinear
from switchgear.weights import Weight
from switchgear.weights.module import matrix_of

_has_any_global_hook: Callable[[], bool] = nn.modules.module._has_any_global_hook


# Arguments of a layer that change nothing here: hooks of transformers record what these ask for.
_IGNORED = {"use_cache", "cache_position", "output_hidden_states", "output_router_logits", "num_items_in_batch"}


# ---- one layer -------------------------------------------------------------------------------------------------------


def _run_layer(
    layer: Any,
    known: LayerClass,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Any = None,
    past_key_values: Any = None,
    position_embeddings: Any = None,
    **others: Any,
) -> Tensor | None:
    """The layer's output, or None if its own forward has to run."""
    cache = past_key_values if cache is None else cache
    if any(value is not None and value is not False for name, value in others.items() if name not in _IGNORED):
        return None
    if position_embeddings is None and known.rotation.pairs != "none":
        return None
    if torch.compiler.is_compiling() or _has_any_global_hook() or in_autocast(hidden_states.device.type):
        return None
    y = _repeat_call(layer, known, hidden_states, attention_mask, position_ids, cache, position_embeddings)
    if y is not None:
        return y
    if hidden_states.dim() != 3 or not hidden_states.is_cpu or not runs_natively(hidden_states.dtype):
        return None
    try:
        attention: Any = get_part(layer, "self_attn", known.attention)
        first: Any = get_part(layer, "input_layernorm", known.norm)
        second: Any = get_part(layer, "post_attention_layernorm", known.norm)
        o_proj = _read_linear(attention, "o_proj")
        if known.is_latent:
            parts: Any = _read_latent_parts(attention, known.norm)
        else:
            parts = [_read_linear(attention, f"{name}_proj") for name in "qkv"]
            norms = [_read_norm(attention, name, known.norm) for name in known.head_norms] or _NO_NORMS
    except Bypassed:
        return None
    weight = o_proj[0]
    if (isinstance(weight, Tensor) and weight.dtype is not hidden_states.dtype) or (
        layer.training and (_has_dropout(attention) or _has_dropout(layer))
    ):
        return None
    mask = _read_mask(attention, attention_mask, position_ids, hidden_states, cache)
    if mask is None:
        return None
    keeping: GrowingLayer | None = None
    if cache is not None:
        if needs_autograd(hidden_states) or (torch.is_grad_enabled() and needs_autograd(*layer.parameters())):
            if known.is_latent or not begins(cache, attention.layer_idx):
                return None
        elif (keeping := adopt_layer(cache, attention.layer_idx)) is None:
            return None

    batch, count, _ = hidden_states.shape
    sinks = getattr(attention, "sinks", None)
    scale = getattr(layer, "residual_multiplier", 1.0)
    if (
        keeping is not None
        and scale == 1
        and known.is_plain
        and (operands := _find_operands(hidden_states, keeping, (*parts, o_proj)))
    ):
        keys, values = keeping.lengthen(count)
        cos, sin = position_embeddings
        (q_weight, eps), (k_weight, _) = norms
        y, residual = ops.attention_block_on_host(
            (hidden_states, first.weight, second.weight, *operands, q_weight, k_weight, cos, sin, mask.starts,
             None if sinks is None else sinks.float()),
            (known.rotation.count(cos), keeping.length, attention.scaling, mask.window or 0, first.variance_epsilon,
             eps, second.variance_epsilon),
            keys, values,
        )  # fmt: skip
        y, residual = y.view(hidden_states.shape), residual.view(hidden_states.shape)
        if keeping.call is None:
            keeping.call = _prepare_call(layer, known, hidden_states, operands, norms)
    else:
        x = _normalize(first, hidden_states) if known.is_centred else rms_norm(hidden_states, *_read_rms(first))
        if known.is_latent:
            q, keys, values = _compute_latent_heads(attention, known, parts, x, position_embeddings, keeping)
        else:
            shape = batch, count, -1, attention.head_dim
            q, k, v = (linear(x, *projection).view(shape) for projection in parts)
            into = None if keeping is None else keeping.extend((k.transpose(1, 2), v.transpose(1, 2)), count)
            q, keys, values = _turn_heads(q, k, v, known, position_embeddings, norms, into)
            if keeping is not None:
                keys, values = keeping.memory  # type: ignore[misc]
            elif cache is not None:  # one that begins, with gradients
                cache.update(keys, values, attention.layer_idx)
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
        if scale != 1:
            out = out * scale
        if known.is_centred:
            residual = hidden_states + out
            y = _normalize(second, residual)
        else:
            y, residual = rms_norm(out, *_read_rms(second), residual=hidden_states)
    mixed = _run_blocks(layer, known, y)
    total: Tensor = residual + (mixed if scale == 1 else mixed * scale)
    return total


def _prepare_call(layer: Any, known: LayerClass, x: Tensor, projections: tuple[Any, ...], norms: Any) -> Any:
    """The LayerCall of a layer whose attention is one op, if its block can be in it; else False."""
    name, *others = known.blocks
    block = layer._modules[name]
    if layer.training or others or (operands := find_operands(block, x)) is None:
        return False
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    (q_weight, eps), (k_weight, _) = norms
    if not all(t is None or t.is_contiguous() for t in (first.weight, second.weight, q_weight, k_weight)):
        return False
    *of_block, choice = operands
    weights = first.weight, second.weight, *projections, q_weight, k_weight
    sinks = getattr(layer.self_attn, "sinks", None)
    numbers = first.variance_epsilon, eps, second.variance_epsilon
    config = block._modules["experts"].config
    return LayerCall(layer, config, x.dtype, numbers, (weights, tuple(of_block), sinks), choice)


def _repeat_call(
    layer: Any, known: LayerClass, x: Tensor, mask: Any, position_ids: Any, cache: Any, angles: Any
) -> Tensor | None:
    """The layer's output by the call of an earlier token, or None if there is none that still holds."""
    attention = layer._modules["self_attn"]
    layers, index = getattr(cache, "layers", []), attention.layer_idx
    if index >= len(layers) or type(keeping := layers[index]) is not GrowingLayer or torch.is_grad_enabled():
        return None
    if not (call := keeping.call) or keeping.memory is None or getattr(cache, "offloading", False):
        return None
    if not call.is_current(layer):
        keeping.call = None
        return None
    if x.dtype is not call.dtype or x.dim() != 3 or not (x.is_contiguous() and ops.needs_no_dispatch(x)):
        return None
    if (seen := _read_mask(attention, mask, position_ids, x, cache)) is None:
        return None
    run, windows = [keeping], [seen.window]
    ahead: Any = getattr(cache, "ahead", None)
    if x.shape[1] == 1 and ahead is not None and not torch.is_inference_mode_enabled():
        for follower, foreseen in _find_followers(layers[index + 1 :], keeping, seen, ahead, x, cache):
            run.append(follower)
            windows.append(foreseen.window)
    count, length, pairs = x.shape[1], keeping.length + x.shape[1], known.rotation.count(angles[0])
    results = ops.decoder_layers_on_host(
        x,
        angles,
        seen.starts,
        [each.call.list_arguments() for each in run],
        tuple(each.call.list_options(pairs, length, window or 0) for each, window in zip(run, windows, strict=True)),
        [each.lengthen(count) for each in run],
    )
    for follower, taken, y in zip(run[1:], results, results[1:], strict=False):
        follower.length -= count  # until the model calls the layer
        ahead.put(taken, y, follower.call, follower)
    return results[0]


def _find_followers(
    layers: list[Any], first: GrowingLayer, seen: Mask, ahead: Ahead, x: Tensor, cache: Any
) -> Iterator[tuple[GrowingLayer, Mask]]:
    """The next layers of a cache, with what they see, up to one that has no call, or whose mask is not known yet, or
    that hooks come before."""
    before, masks = first.call, {read_window(first.call.attention): seen}
    for keeping in layers:
        if has_hooks(before.layer) or type(keeping) is not GrowingLayer or keeping.length != first.length:
            return
        if not (call := keeping.call) or not call.follows or keeping.memory is None or call.dtype is not before.dtype:
            return
        if call.config is not before.config or call.attention.config is not before.attention.config:
            return
        if (window := read_window(call.attention)) not in masks:
            arguments = ahead.foresee(window, read_window(first.call.attention))
            if arguments is None:
                return
            mask = _read_mask(call.attention, arguments.get("attention_mask"), arguments.get("position_ids"), x, cache)
            if mask is None or mask.starts is not seen.starts:
                return
            masks[window] = mask
        if has_hooks(call.layer) or not call.snapshot.is_current():
            return
        yield keeping, masks[window]
        before = call


_NO_NORMS = ((None, 1e-6), (None, 1e-6))


def _turn_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    known: LayerClass,
    angles: Any,
    norms: Any = _NO_NORMS,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """rotate_heads in the form of a layer."""
    rotation = known.rotation
    cos: Tensor | None
    sin: Tensor | None
    if rotation.pairs == "none":
        cos = sin = None
    else:
        cos, sin = (angles.real, angles.imag) if isinstance(angles, Tensor) else angles
        cos, sin = rotation.select(cos), rotation.select(sin)
    if rotation.pairs == "split":
        q, k = (torch.cat((t[..., ::2], t[..., 1::2]), -1) for t in (q, k))
    is_interleaved = rotation.pairs == "interleaved"
    (q_weight, eps), (k_weight, _) = norms
    if known.turns_first:
        q, keys, values = rotate_heads(q, k, v, cos, sin, interleaved=is_interleaved)
        k, v, cos, sin = keys.transpose(1, 2), values.transpose(1, 2), None, None
    return rotate_heads(
        q, k, v, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=eps, interleaved=is_interleaved, into=into
    )


def _run_blocks(layer: Any, known: LayerClass, y: Tensor) -> Tensor:
    """The sum of what the blocks return."""
    total: Any = None
    for name in known.blocks:
        out = run_block(layer._modules[name], y)
        if isinstance(out, tuple):
            out = out[0]
        total = out if total is None else total + out
    return total  # type: ignore[no-any-return]


def _has_dropout(module: nn.Module) -> bool:
    return any("dropout" in name and isinstance(p, float) and p > 0 for name, p in vars(module).items())


def _find_operands(x: Tensor, keeping: GrowingLayer, projections: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What the kernels read of projections: the tensors, the form and the bias of each. None if not all can be read in
    one call: a gradient or a dispatcher sees the ops, or the cache has no memory yet."""
    if torch.is_grad_enabled() or keeping.memory is None or not ops.needs_no_dispatch(x) or not x.is_contiguous():
        return None
    found: list[Any] = []
    for weight, bias in projections:
        if type(weight) is nn.Parameter and weight.stride(-1) == 1:
            found += (weight, (), bias)
        elif type(weight) is Weight and (operand := weight.direct_operand(x.dtype)) is not None:
            found += (operand.tensors, operand.form, bias)
        else:
            return None
    return tuple(found)


# ---- parts of a layer ------------------------------------------------------------------------------------------------


def _read_linear(module: nn.Module, name: str) -> tuple[AnyWeight, Tensor | None]:
    part: Any = module._modules[name]
    if type(part) is StoredLinear:
        check_call(part, name)
        return matrix_of(part), part.bias
    part = get_part(module, name, LINEAR)
    return part.weight, part.bias


def _read_norm(module: nn.Module, name: str, known: PartClass) -> tuple[Tensor, float]:
    return _read_rms(get_part(module, name, known))


def _read_rms(norm: Any) -> tuple[Tensor, float]:
    return norm.weight, norm.variance_epsilon


def _normalize(norm: Any, x: Tensor) -> Tensor:
    """torch's LayerNorm, which computes each row by itself."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


# ---- latent attention ------------------------------------------------------------------------------------------------


class LatentParts(NamedTuple):
    """Queries have one projection, or two with a norm between; kv_a also gives the part of keys that turns."""

    q: tuple[Any, ...]
    q_norm: tuple[Tensor, float] | None
    kv_a: tuple[Any, ...]
    kv_norm: tuple[Tensor, float]
    kv_b: tuple[Any, ...]


def _read_latent_parts(attention: nn.Module, norm: PartClass) -> LatentParts:
    names: tuple[str, ...]
    if attention._modules.get("q_proj") is None:
        names, q_norm = ("q_a_proj", "q_b_proj"), _read_norm(attention, "q_a_layernorm", norm)
    else:
        names, q_norm = ("q_proj",), None
    return LatentParts(
        q=tuple(_read_linear(attention, name) for name in names),
        q_norm=q_norm,
        kv_a=_read_linear(attention, "kv_a_proj_with_mqa"),
        kv_norm=_read_norm(attention, "kv_a_layernorm", norm),
        kv_b=_read_linear(attention, "kv_b_proj"),
    )


def _compute_latent_heads(
    attention: Any, known: LayerClass, parts: LatentParts, x: Tensor, angles: Any, keeping: GrowingLayer | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values for `attend`. The cache has a token's vector and the part of its keys that turns, as
    transformers', and beside them what they are expanded to."""
    batch, count, _ = x.shape
    still, turning, rank = attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.kv_lora_rank
    q = linear(x, *parts.q[0])
    if parts.q_norm is not None:
        q = linear(rms_norm(q, *parts.q_norm), *parts.q[1])
    q_still, q_turning = torch.split(q.view(batch, count, -1, still + turning), [still, turning], -1)
    vector, k = torch.split(linear(x, *parts.kv_a), [rank, turning], -1)
    vector = rms_norm(vector, *parts.kv_norm)[:, :, None]
    k = k[:, :, None]
    into = None
    if keeping is not None:
        into = keeping.extend((vector.transpose(1, 2), k.transpose(1, 2)), count)[::-1]
    q_turned, k, vector = _turn_heads(q_turning, k, vector, known, angles, into=into)

    def expand(vector: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all heads, of [B,1,L,rank] and [B,1,L,turning]."""
        length = vector.shape[2]
        heads = linear(vector[:, 0], *parts.kv_b).view(batch, length, q_still.shape[2], -1).transpose(1, 2)
        return torch.cat((heads[..., :still], k.expand(-1, heads.shape[1], -1, -1)), -1), heads[..., still:]

    keys, values = expand(vector, k) if keeping is None else keeping.expand(expand)
    return torch.cat((q_still, q_turned), -1), keys, values


# ---- masks -----------------------------------------------------------------------------------------------------------


class Mask(NamedTuple):
    """What a token sees: the window tokens up to itself, from its sequence's start on."""

    starts: Tensor | None  # [B] int32, indices of the cache
    window: int | None


_masks: dict[int | None, tuple[Any, Any, Mask | None]] = {}  # by window: the last one, which layers share


def _read_mask(
    attention: Any, mask: Tensor | None, position_ids: Tensor | None, hidden_states: Tensor, cache: Any
) -> Mask | None:
    """The meaning of a mask, or None if it is another one."""
    if attention.config._attn_implementation not in ("sdpa", "eager"):
        return None
    if mask is None:  # sdpa's is causal without a window, eager attention sees all
        return Mask(None, None) if attention.config._attn_implementation == "sdpa" else None
    window = read_window(attention)
    if type(mask) is not Tensor or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != hidden_states.shape[1]:
        return None
    key = mask.shape, None if mask.is_inference() else mask._version  # it may be written to
    kept, known, meaning = _masks.get(window, (lambda: None, None, None))
    if kept() is not mask or known != key:
        meaning = _find_mask(mask, position_ids, window)
        if meaning is None and window is not None:  # layers without a window may have its length
            meaning = _find_mask(mask, position_ids, None)
        _masks[window] = weakref.ref(mask), key, meaning
    return meaning


def _find_mask(mask: Tensor, position_ids: Tensor | None, window: int | None) -> Mask | None:
    """Where sequences start, if the mask has this window."""
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
    """Replaces the forward of each layer that is known, of the model and of the norm after them: yields (name, module,
    undo)."""
    tried: dict[Any, LayerClass | None] = {}  # layers of a class may differ in plain values, as of a window
    replaced: set[nn.Module] = set()
    for name, module in model.named_modules():
        known = find_layer_class(module)
        if known is None or not runs_own_forward(module):
            continue
        kind = type(module)
        key = known, _list_values(module), _list_values(module._modules["self_attn"])
        if key not in tried:
            tried[key] = _try_layer(module, known, _find_rotary(model, name))
        if (form := tried[key]) is not None:
            replaced.add(module)
            yield name, module, replace_forward(module, _build_forward(form, kind))
    for name, module in model.named_modules():
        layers: Any = module._modules.get("layers")
        if not isinstance(layers, nn.ModuleList) or replaced.isdisjoint(layers):
            continue
        if find_class(module) is not None and runs_own_forward(module):
            yield name, module, replace_forward(module, _build_model_forward(type(module).forward))
        norm: Any = module._modules.get("norm")
        if norm is not None and runs_own_forward(norm) and divides_by_root_mean_square(norm):
            yield f"{name}.norm".lstrip("."), norm, replace_forward(norm, _build_norm(type(norm).forward))


def _try_layer(layer: Any, known: LayerClass, rotary: Any) -> LayerClass | None:
    """The form of a layer that computes what its own forward does."""
    form = find_form(layer, known, rotary, _run_layer)
    difference = form if isinstance(form, str) else find_difference(layer, form, rotary, _run_layer)
    if difference is None:
        return form  # type: ignore[return-value]
    warn_once(f"{type(layer).__name__} is left alone, it does not compute what switchgear expects: {difference}")
    return None


def _find_rotary(model: nn.Module, layer: str) -> Any:
    """The module beside the list of layers that computes cos and sin."""
    owner: Any = model.get_submodule(layer.rpartition(".")[0].rpartition(".")[0])
    return getattr(owner, "rotary_emb", None)


def _list_values(module: Any) -> frozenset[tuple[str, Any]]:
    plain = (int, float, bool, str, type(None))
    return frozenset((k, v) for k, v in vars(module).items() if type(v) in plain and k not in ("layer_idx", "training"))


def _build_forward(known: LayerClass, kind: type[nn.Module]) -> Callable[..., Any]:
    own: Any = kind.forward
    # Where no __call__ of the class starts a checkpoint, its forward does, around the one that it wraps.
    inner = getattr(own, "__wrapped__", own) if kind.__call__ is nn.Module.__call__ else None

    def run(self: Any, own: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        out = _run_layer(self, known, hidden_states, **kwargs)
        return own(self, hidden_states, **kwargs) if out is None else out

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or type(self).forward is not own:
            return type(self).forward(self, hidden_states, *args, **kwargs)
        cache = kwargs.get("past_key_values") if (given := kwargs.get("cache")) is None else given
        ahead = getattr(cache, "ahead", None)
        if ahead is not None and (y := ahead.take(self, hidden_states, kwargs)) is not None:
            return y
        if inner is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None:
                return own(self, hidden_states, **kwargs)
            return self._gradient_checkpointing_func(functools.partial(run, self, inner, **kwargs), hidden_states)
        return run(self, own, hidden_states, **kwargs)

    return forward


def _build_model_forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a model's class, during which nothing else calls the layers, and the cache has what is computed
    ahead."""

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values") if (given := kwargs.get("cache")) is None else given
        if type(self).forward is not own or torch.compiler.is_compiling() or not isinstance(cache, Cache):
            return type(self).forward(self, *args, **kwargs)
        cache.ahead = Ahead()  # type: ignore[attr-defined]
        try:
            return own(self, *args, **kwargs)
        finally:
            del cache.ahead  # type: ignore[attr-defined]

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
