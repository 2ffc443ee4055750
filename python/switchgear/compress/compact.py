# SPDX-License-Identifier: BSD-3-Clause
"""Experts whose bfloat16 weights take 12 bits instead of 16, without loss: see reference_compact for the format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from switchgear import ops, reference_compact
from switchgear.backends import in_autocast
from switchgear.compress.formats import QuantizedExperts, quantized_of
from switchgear.functional import _limit, _needs_autograd, _number, _rows_of, moe
from switchgear.packing import Layout, layout_of
from switchgear.pages import advise_huge_pages

WORTH = 0.9  # of the plain bytes: above that compact weights are not worth their name


@dataclass(frozen=True)
class CompactExperts:
    """What became of a module's projections: parameters `names` went, buffers `<name>_compact` came."""

    names: tuple[str, str]
    transposed: bool  # the parameters were [E,in,out]
    columns: tuple[int, int]  # H and I
    trained: tuple[bool, bool]  # whether they asked for gradients

    def rows(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Both projections of `module` as they are stored."""
        first, second = (getattr(module, f"{name}_compact") for name in self.names)
        return first, second

    def weights(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Both projections as they were, [E,out,in]."""
        first, second = map(expanded, self.rows(module), self.columns)
        return first, second

    def moe(self, module: nn.Module, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, **options: Any) -> Tensor:
        """switchgear.moe with the projections of `module`."""
        return compact_moe(x, *self.rows(module), self.columns, topk_ids, topk_weights, **options)


def compact_of(module: nn.Module) -> CompactExperts | None:
    """What `compact` made of a module's projections, None where it made nothing."""
    return vars(module).get("_switchgear_compact")


def compact(model: nn.Module) -> int:
    """Stores the experts' bfloat16 projections in 12 bits a weight instead of 16, without loss, for decoding on a CPU.

    Generating text waits for weights from memory, and these are a quarter less: with few tokens per expert a layer
    takes up to a quarter less time, with many it takes a tenth longer. Results have the same bits. The parameters of
    the projections go; in their place are buffers `<name>_compact`. State dicts hold, and take, the plain weights under
    their own names, so checkpoints know nothing of it. Where gradients are asked for, or on another device, a call
    expands the weights for its duration.

    Args:
        model: has `Experts`, or experts of transformers that run on the fused kernel (`accelerate`).

    Returns the number of experts modules whose weights are compact now.

    Raises:
        ValueError: the model has no such experts with bfloat16 parameters of which this saves a tenth; the message says
            why those there are stay as they are.
    """
    reason = f"{type(model).__name__} has no experts that run on the fused kernel"
    found = 0
    for module in model.modules():
        if compact_of(module) is not None:
            found += 1
        elif (layout := layout_of(module)) is not None:
            obstacle = _compact_module(module, layout)
            found += obstacle is None
            reason = obstacle or reason
    if not found:
        raise ValueError(f"model: expected experts that can be compact; {reason}")
    return found


def expand(model: nn.Module) -> int:
    """Takes `compact` back: the parameters are there again, bit for bit. Returns the number of modules it changed."""
    changed = 0
    for module in model.modules():
        if (state := compact_of(module)) is not None:
            for name, weight, trained in zip(state.names, state.weights(module), state.trained, strict=True):
                del module._buffers[f"{name}_compact"]
                module._non_persistent_buffers_set.discard(f"{name}_compact")
                weight = weight.mT.contiguous() if state.transposed else weight
                module.register_parameter(name, nn.Parameter(weight, requires_grad=trained))
            module._switchgear_compact = None  # type: ignore[assignment]
            changed += 1
    return changed


def compacted(weight: Tensor) -> Tensor:
    """Compact rows [E,N,B] uint8 of a weight [E,N,C] bfloat16 on the CPU, as reference_compact.compact makes them."""
    weight = weight.detach().contiguous()
    num_experts, rows, columns = weight.shape
    header = reference_compact.header_bytes(0)
    while True:  # twice where the first headers have no room for the exceptions of some row
        out = torch.empty(
            num_experts, rows, header + reference_compact.records_bytes(columns), dtype=torch.uint8, device="cpu"
        )
        advise_huge_pages(out)
        needed = reference_compact.header_bytes(ops.host.module.pack_compact(weight, out, torch.get_num_threads()))
        if needed <= header:
            return out
        header = needed


def expanded(rows: Tensor, columns: int) -> Tensor:
    """The weight [E,N,C] bfloat16 of compact rows, as reference_compact.expand."""
    if not rows.is_cpu or torch.compiler.is_compiling():
        return reference_compact.expand(rows, columns)
    weight = torch.empty(*rows.shape[:-1], columns, dtype=torch.bfloat16)
    advise_huge_pages(weight)
    ops.host.module.expand_compact(rows.contiguous(), weight, torch.get_num_threads())
    return weight


def compact_moe(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    columns: tuple[int, int],
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float = 1.702,
    limit: float | None = None,
) -> Tensor:
    """switchgear.moe with compact weights, whose numbers of columns are H and I; x is bfloat16.

    Inside torch.autocast x is cast to its dtype, as in moe. ValueError for an x of another H, which rows of bytes do
    not show.
    """
    if x.shape[-1] != columns[0]:
        raise ValueError(f"x: expected shape [..., {columns[0]}], got {list(x.shape)}")
    device_type = x.device.type
    dtype = x.dtype
    if in_autocast(device_type) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    reads_compact = dtype is torch.bfloat16 and x.is_cpu
    if not reads_compact or _needs_autograd(x, gate_up_bias, down_bias, topk_weights):
        weights = expanded(gate_up_proj, columns[0]), expanded(down_proj, columns[1])
        return moe(
            x, *weights, topk_ids, topk_weights, activation=activation, gated=gated, interleaved=interleaved,
            gate_up_bias=gate_up_bias, down_bias=down_bias, alpha=alpha, limit=limit,
        )  # fmt: skip
    shape = x.shape
    x, topk_ids, topk_weights = _rows_of(x.to(dtype), topk_ids, topk_weights)
    biases = [None if bias is None else bias.to(dtype) for bias in (gate_up_bias, down_bias)]
    others = (gate_up_proj, down_proj, *biases, topk_ids, topk_weights)
    options = (activation, gated, interleaved, _number("alpha", alpha), _limit(limit))
    if ops.needs_no_dispatch(x, *others):
        y = ops.moe_forward_on_host(x, *others, *options)  # type: ignore[arg-type]
    else:
        y = ops.moe_forward(x, *others, *options, False)[0]
    return y if len(shape) == 2 else y.reshape(shape)


def _compact_module(module: nn.Module, layout: Layout) -> str | None:
    """Makes a module's projections compact, or says why not."""
    rows, columns, trained = [], [], []
    for name in layout.names:
        weight = module._parameters.get(name)  # under a parametrization the attribute is none, but is made of one
        if type(weight) is not nn.Parameter:
            return f"{name} is {'computed' if weight is None else f'a {type(weight).__name__}'}, no plain parameter"
        if weight.dtype is not torch.bfloat16:
            return f"{name} is {weight.dtype}, not torch.bfloat16"
        if not weight.is_cpu:
            return f"{name} is on {weight.device}, and compact weights are for the CPU"
        view = weight.mT if layout.transposed else weight
        if view.shape[-1] > reference_compact.MAX_COLUMNS:
            return f"{name} has {view.shape[-1]} columns, more than {reference_compact.MAX_COLUMNS}"
        rows.append(compacted(view))
        columns.append(view.shape[-1])
        trained.append(weight.requires_grad)
        if (part := rows[-1].nbytes / weight.nbytes) > WORTH:
            return f"{name} would still take {part:.0%} of its bytes"
    for name, tensor in zip(layout.names, rows, strict=True):
        module.register_parameter(name, None)
        module.register_buffer(f"{name}_compact", tensor, persistent=False)
    if "_switchgear_compact" not in vars(module):  # the hooks do nothing while a module is plain
        hooked: Any = module
        hooked.register_state_dict_post_hook(_save_plain)
        hooked.register_load_state_dict_pre_hook(_load_plain)
    module._switchgear_compact = CompactExperts(  # type: ignore[assignment]
        layout.names, layout.transposed, (columns[0], columns[1]), (trained[0], trained[1])
    )
    return None


def _save_plain(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    if (state := compact_of(module)) is not None:
        for name, weight in zip(state.names, state.weights(module), strict=True):
            state_dict[prefix + name] = weight.mT.contiguous() if state.transposed else weight


def _load_plain(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any, strict: bool, missing: list[str], *__: Any
) -> None:
    if (state := compact_of(module)) is None:
        return
    for name, columns, now in zip(state.names, state.columns, state.rows(module), strict=True):
        weight = state_dict.pop(prefix + name, None)
        if weight is None:
            if strict:
                missing.append(prefix + name)
            continue
        view = weight.mT if state.transposed else weight
        expected = (*now.shape[:2], columns)
        if tuple(view.shape) != expected:
            shape = (expected[0], *reversed(expected[1:])) if state.transposed else expected
            raise ValueError(f"{prefix}{name}: expected shape {list(shape)}, got {list(weight.shape)}")
        setattr(module, f"{name}_compact", compacted(view.to(torch.bfloat16)))


def compressed_of(module: nn.Module) -> QuantizedExperts | CompactExperts | None:
    """What holds a module's projections in place of its parameters: QuantizedExperts, CompactExperts, or None."""
    return quantized_of(module) or compact_of(module)
