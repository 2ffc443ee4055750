# SPDX-License-Identifier: BSD-3-Clause
"""Finds what a decoder layer computes: runs its class's own forward on random inputs and compares.

The form is found in float32, on a copy with random weights and without the experts: so weights that are rounded,
stored, zero or not loaded yet do not hide a difference. The layer itself is compared too, in its dtype.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from switchgear.functional import rms_norm
from switchgear.integrations.layer_classes import LayerClass, find_class
from switchgear.layers.linear import StoredLinear
from switchgear.utils.modules import set_eval

_BATCH, _TOKENS = 3, 12
_FAR = 1 << 17  # positions where layers that scale by them do
_LARGE = 1000.0  # what values are multiplied by, so that layers that clip them do

Case = dict[str, Any]
Run = Callable[..., Tensor | None]  # _run_layer
Results = tuple[Tensor, Tensor, Tensor]  # of a call: the output, and what the cache has then


_ERRORS = RuntimeError, TypeError, ValueError, AttributeError, KeyError


@torch.no_grad()
def find_form(layer: Any, known: LayerClass, rotary: Any, run: Run) -> LayerClass | str:
    """The form of the layer, or how it differs from all forms that are known."""
    generator = torch.Generator().manual_seed(0)
    twin = _copy_with_random_weights(layer, generator)
    try:
        cases = _list_cases(
            twin, copy.deepcopy(rotary), generator
        )  # rotary may keep what it computed for far positions
    except _ERRORS as error:
        return _describe(error)
    wanted = _run_own_forward(twin, layer, known, cases)
    if isinstance(wanted, str):
        return wanted
    differences = []
    for form in known.list_forms():
        found = [_compare(twin, form, case, want, run) for case, want in zip(cases, wanted, strict=True)]
        if not any(found):
            break
        differences.append(max(found))
    else:
        return differences[0]
    if not _is_causal_without_mask(layer):
        return form
    single = _take_first_token(cases[0])  # its attention is its value, whatever the scores
    _scale_values(twin)
    return _compare(twin, form, single, _call(type(layer).forward, twin, single), run) or form


def _run_own_forward(twin: Any, layer: Any, known: LayerClass, cases: list[Case]) -> list[Results] | str:
    """The results of the class's forward, with blocks that return a tensor or, if that is wrong, a pair."""
    messages = []
    for is_pair in (False, True):
        for name in known.blocks:
            twin._modules[name] = _build_stand_in(layer._modules[name], is_pair)
        try:
            return [_call(type(layer).forward, twin, case) for case in cases]
        except _ERRORS as error:
            messages.append(_describe(error))
    return messages[0]


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@torch.no_grad()
def find_difference(layer: Any, form: LayerClass, rotary: Any, run: Run) -> str | None:
    """Compares on the layer itself, with its blocks. Returns how the results differ, or None."""
    weight = layer.input_layernorm.weight
    if weight.is_meta:
        return None  # nothing to compare yet
    projection = next(part for name, part in layer.self_attn.named_children() if name.endswith("proj"))
    dtype = getattr(projection.weight, "dtype", weight.dtype)
    with set_eval(layer):
        try:
            case = _list_cases(layer, rotary, torch.Generator().manual_seed(0), dtype)[0]
            want = _call(type(layer).forward, layer, case)
        except _ERRORS as error:
            return _describe(error)
        return _compare(layer, form, case, want, run) or None if bool(want[0].isfinite().all()) else None


def _call(own: Callable[..., Any], layer: Any, case: Case) -> Results:
    cache = DynamicCache()
    name = "cache" if "cache" in inspect.signature(own).parameters else "past_key_values"
    y = own(layer, **case, **{name: cache})
    return y[0] if isinstance(y, tuple) else y, *_read_cache(cache, layer)


def _read_cache(cache: Any, layer: Any) -> tuple[Tensor, Tensor]:
    kept = cache.layers[layer.self_attn.layer_idx]
    return kept.keys, kept.values


def _compare(layer: Any, form: LayerClass, case: Case, want: Results, run: Run) -> str:
    """How the form's result differs, or what it leaves in a cache; empty if they do not."""
    cache = DynamicCache()
    try:
        y = run(layer, form, **case, cache=cache)
    except _ERRORS as error:
        return _describe(error)
    if y is None:
        return "a part has hooks, adapters or another class"
    x = case["hidden_states"]
    pairs = [(y.float() - x.float(), want[0].float() - x.float())]
    pairs += [(a.float(), b.float()) for a, b in zip(_read_cache(cache, layer), want[1:], strict=True)]
    for got, expected in pairs:
        if got.shape != expected.shape:
            return f"shape {tuple(got.shape)}, not {tuple(expected.shape)}"
        # Both round at a dozen places in the layer's dtype; another meaning differs by the size of its terms.
        bound = 32 * torch.finfo(x.dtype).eps * (x.float().abs().max() + expected.abs().max())
        difference = (got - expected).abs().max()
        if not difference <= bound:
            return f"difference {difference:.1e} of {expected.abs().max():.1e}"
    return ""


# ---- inputs ----------------------------------------------------------------------------------------------------------


def _list_cases(layer: Any, rotary: Any, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> list[Case]:
    """Arguments of a layer's forward: with a mask, and far from a sequence's start, without one if that is causal."""
    weight = layer.input_layernorm.weight
    x = torch.randn(_BATCH, _TOKENS, weight.shape[0], generator=generator).to(weight.device, dtype)
    position = torch.arange(_TOKENS, device=x.device)
    sees = position <= position[:, None]
    if (window := getattr(layer.self_attn, "sliding_window", None)) is not None:
        sees = sees & (position > position[:, None] - window)
    mask: Any = sees[None, None].expand(_BATCH, 1, -1, -1)
    if layer.self_attn.config._attn_implementation == "eager":
        mask = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
    cases = []
    for begin in (0, _FAR):
        position_ids = position[None] + begin
        cases.append({
            "hidden_states": x, "attention_mask": mask, "position_ids": position_ids,
            "position_embeddings": _compute_angles(rotary, layer.self_attn, x, position_ids),
        })  # fmt: skip
    if window is None and _is_causal_without_mask(layer):
        cases[1]["attention_mask"] = None
    return cases


def _is_causal_without_mask(layer: Any) -> bool:
    """Whether a call without a mask is meant to be causal, as of sdpa; eager attention then sees all."""
    return bool(layer.self_attn.config._attn_implementation != "eager")


def _compute_angles(rotary: Any, attention: Any, x: Tensor, position_ids: Tensor) -> Any:
    if rotary is None:
        return None
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        return rotary(x, position_ids, layer_type=attention.config.layer_types[attention.layer_idx])
    return rotary(x, position_ids)


def _take_first_token(case: Case) -> Case:
    """The call for one token, without a mask."""
    angles = case["position_embeddings"]
    if angles is not None:
        angles = tuple(t[:1, :1] for t in angles) if isinstance(angles, tuple) else angles[:1, :1]
    return {
        "hidden_states": case["hidden_states"][:1, :1], "attention_mask": None,
        "position_ids": case["position_ids"][:, :1], "position_embeddings": angles,
    }  # fmt: skip


# ---- copies ----------------------------------------------------------------------------------------------------------

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _copy_with_random_weights(module: Any, generator: torch.Generator) -> Any:
    """The module in eval mode and float32, without hooks and replaced forwards. Blocks are left out."""
    if type(module) is StoredLinear:
        linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        return _copy_with_random_weights(linear, generator)
    new = object.__new__(type(module))
    own = {name: value for name, value in vars(module).items() if name not in ("forward", "_old_forward", "_hf_hook")}
    own |= {name: type(own[name])() for name in _HOOKS}
    own["_parameters"] = {
        name: None if parameter is None else nn.Parameter(_draw(parameter.shape, generator), requires_grad=False)
        for name, parameter in module._parameters.items()
    }
    own["_modules"] = {
        name: None if part is None else _copy_with_random_weights(part, generator)
        for name, part in module._modules.items()
        if name == "self_attn" or not _is_layer(module) or name.endswith("layernorm")
    }
    new.__dict__.update(own, training=False)
    return new


def _is_layer(module: nn.Module) -> bool:
    return "self_attn" in module._modules


def _draw(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Weights whose attention differs between positions; norms and biases near 1."""
    numbers = torch.randn(shape, generator=generator)
    return 1 + numbers / 4 if len(shape) == 1 else 1.5 * numbers * shape[-1] ** -0.5


def _scale_values(twin: Any) -> None:
    """Makes queries, keys and values large."""
    for name, parameter in twin.self_attn.named_parameters():
        if parameter.dim() == 2 and not name.startswith("o_proj"):
            parameter.mul_(_LARGE)


def _build_stand_in(block: nn.Module, is_pair: bool) -> nn.Module:
    """A block of the same class that doubles its input."""

    def forward(self: Any, hidden_states: Tensor) -> Any:
        return (2 * hidden_states, None) if is_pair else 2 * hidden_states

    cls: Any = type("StandIn", (type(block),), {"forward": forward})
    new: nn.Module = cls.__new__(cls)
    nn.Module.__init__(new)
    return new


@torch.no_grad()
def divides_by_root_mean_square(norm: Any) -> bool:
    """Whether a module of one weight is `rms_norm` with its `variance_epsilon`."""
    if find_class(norm) is None or list(norm._parameters) != ["weight"] or not hasattr(norm, "variance_epsilon"):
        return False
    generator = torch.Generator().manual_seed(0)
    twin = _copy_with_random_weights(norm, generator)
    x = torch.randn(_BATCH, twin.weight.shape[0], generator=generator)
    difference = rms_norm(x, twin.weight, twin.variance_epsilon) - type(norm).forward(twin, x)
    return bool(difference.abs().max() <= 32 * torch.finfo(x.dtype).eps * x.abs().max())
