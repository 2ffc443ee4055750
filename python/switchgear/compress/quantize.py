# SPDX-License-Identifier: BSD-3-Clause
"""Experts whose weights have 8 or 4 bits: made of plain ones, saved, loaded, and made plain again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from switchgear.compress.formats import Format, QuantizedExperts, QuantizedMatrix, quantized_of
from switchgear.packing import Layout, layout_of
from switchgear.pages import advise_huge_pages
from switchgear.reference_quantized import Quantized, from_blocks, to_blocks
from switchgear.reference_quantized import dequantize as dequantize_levels
from switchgear.reference_quantized import quantize as quantize_levels
from switchgear.stored import stored_of


def quantize(model: nn.Module, dtype: str, *, group_size: int | None = None, symmetric: bool = True) -> int:
    """Stores the experts' projections in 8 or 4 bits, and multiplies them with activations that are rounded to int8.

    The parameters of the projections go; in their place are buffers `<name>_values`, `<name>_scales`,
    `<name>_row_scales` and, unless symmetric, `<name>_zeros`, which the state dict holds. A quantised module loads
    both kinds of checkpoints: its own format, and plain weights, which it quantises. Biases stay as they are. Gradients
    reach x, topk_weights and biases.

    Args:
        model: has `Experts`, or experts of transformers that run on the fused kernel (`accelerate`).
        dtype: "int8", or "int4".
        group_size: columns of a weight that share a scale, a power of two from 16 on, or 0 for a whole row. By default
            0 for int8 and 32 for int4.
        symmetric: levels around zero. Otherwise each group has a zero besides: 8 bits, as the scale.

    Returns the number of experts modules that have the format now.

    Raises:
        ValueError: there is nothing to quantise; a format that is not known; weights that are not finite, or have
            another format already.
    """
    format = Format(dtype, group_size, symmetric)
    found = 0
    for module in model.modules():
        if (stored := stored_of(module)) is not None:
            raise ValueError(f"model: expected plain weights, got {stored.form.noun}; take that back first")
        present = quantized_of(module)
        if present is not None:
            if present.format != format:
                raise ValueError(f"model: expected plain weights, got {present.format}; dequantize it first")
            found += 1
        elif (layout := layout_of(module)) is not None:
            _quantize_module(module, layout, format)
            found += 1
    if not found:
        raise ValueError(f"model: expected experts that run on the fused kernel, {type(model).__name__} has none")
    return found


def dequantize(model: nn.Module) -> int:
    """Takes `quantize` back: the parameters are there again, with the values that the levels stand for, in the dtype
    they had. Returns the number of modules it changed."""
    changed = 0
    for module in model.modules():
        if (quantized := quantized_of(module)) is not None:
            for name, matrix in zip(quantized.names, quantized.matrices(module), strict=True):
                weight = plain_weight(matrix).to(quantized.dtype)
                weight = weight.mT.contiguous() if quantized.transposed else weight
                for kind in Quantized._fields:
                    module._buffers.pop(f"{name}_{kind}", None)
                module.register_parameter(name, nn.Parameter(weight, requires_grad=quantized.trained))
            module._switchgear_quantized = None  # type: ignore[assignment]
            changed += 1
    return changed


def plain_weight(matrix: QuantizedMatrix) -> Tensor:
    """The weight [E,N,C] that a matrix stands for, in float32."""
    format = matrix.format
    levels = from_blocks(matrix.weight, matrix.rows, matrix.columns, format.bits, matrix.parts)
    return dequantize_levels(levels, format.bits, format.columns_per_scale)


def quantized_weight(weight: Tensor, parts: int, format: Format) -> Quantized:
    """A weight [E,N,C] in blocks."""
    levels = quantize_levels(weight, format.bits, format.columns_per_scale, format.symmetric)
    return to_blocks(levels, format.bits, parts)


def _on_huge_pages(tensor: Tensor) -> Tensor:
    copy = torch.empty_like(tensor)
    advise_huge_pages(copy)
    return copy.copy_(tensor)


def _buffers(name: str, weight: Quantized) -> dict[str, Tensor]:
    named = {f"{name}_{kind}": tensor for kind, tensor in weight._asdict().items() if tensor is not None}
    return {key: _on_huge_pages(tensor) for key, tensor in named.items()}


def _quantize_module(module: nn.Module, layout: Layout, format: Format) -> None:
    weights = [getattr(module, name).detach() for name in layout.names]
    views = [weight.mT if layout.transposed else weight for weight in weights]
    parts = (2 if layout.split_gates else 1, 1)
    buffers: dict[str, Tensor] = {}
    for name, weight, count in zip(layout.names, views, parts, strict=True):
        buffers |= _buffers(name, quantized_weight(weight, count, format))
    shapes: Any = tuple(tuple(weight.shape) for weight in views)
    trained = any(getattr(module, name).requires_grad for name in layout.names)
    for name in layout.names:
        module.register_parameter(name, None)
    for name, tensor in buffers.items():
        module.register_buffer(name, tensor)
    if "_switchgear_quantized" not in vars(module):  # the hook does nothing while a module is plain
        hooked: Any = module
        hooked.register_load_state_dict_pre_hook(_load_plain)
    module._switchgear_quantized = QuantizedExperts(  # type: ignore[assignment]
        format, layout.names, layout.transposed, parts[0], shapes, weights[0].dtype, trained
    )


def _load_plain(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Quantises the plain weights of a checkpoint on their way into a quantised module."""
    if (quantized := quantized_of(module)) is None:
        return
    for name, shape, parts in zip(quantized.names, quantized.shapes, (quantized.parts, 1), strict=True):
        plain = state_dict.get(prefix + name)
        if plain is None:
            continue
        weight = plain.mT if quantized.transposed else plain
        if tuple(weight.shape) != shape:
            expected = (shape[0], *reversed(shape[1:])) if quantized.transposed else shape
            raise ValueError(f"{prefix}{name}: expected shape {list(expected)}, got {list(plain.shape)}")
        del state_dict[prefix + name]
        for key, tensor in quantized_weight(weight, parts, quantized.format)._asdict().items():
            if tensor is not None:
                state_dict[f"{prefix}{name}_{key}"] = tensor
