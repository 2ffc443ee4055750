# SPDX-License-Identifier: BSD-3-Clause
"""Fp8, Mxfp4, Nf4 and Nvfp4: numbers of 8 or 4 bits with scales, as DeepSeek-V3, Qwen3 and gpt-oss publish them, as
QLoRA and bitsandbytes store them, and as ModelOpt writes them; see reference/minifloat.py and reference/nf4.py.

State dicts have the published layout, for saving and loading: fp8 as <name> float8_e4m3fn [E,N,C] and
<name>_scale_inv, mxfp4 as <name>_blocks [E,N,C/32,16] and <name>_scales, nf4 as <name>_codes [E,N,C/2] and
<name>_absmax, nvfp4 as <name>_packed [E,N,C/2], <name>_scale float8_e4m3fn [E,N,C/16] and <name>_scale_2 float32
[E,parts]. Weights are decoded and multiplied in floating point. Gradients reach x, topk_weights and biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from switchgear.reference import check_choice, minifloat, nf4
from switchgear.weights.form import Form, KeyedForm, check_loaded, on_huge_pages
from switchgear.weights.weight import Weight

__all__ = ["Fp8", "Mxfp4", "Nf4", "Nvfp4"]

BLOCKS = {"128x128": minifloat.BLOCK, "row": minifloat.ROW}


def _stored(format: str, published: Sequence[Tensor], parts: int, block: tuple[int, int]) -> dict[str, Tensor]:
    """Converts the published layout to the tensors of a Weight."""
    values, scales, *tensor_scales = published
    data, stored = minifloat.to_blocks(values, scales, format, parts, block)
    tensors = {"data": on_huge_pages(data), "scales": on_huge_pages(stored)}
    for each in tensor_scales:
        tensors["row_scales"] = minifloat.to_row_scales(each, values.shape[1])
    return tensors


def _encoded(
    form: Form,
    weight: Tensor,
    parts: int,
    encoded: minifloat.Encoded | minifloat.EncodedNvfp4,
    group_size: int,
    block: tuple[int, int] = minifloat.BLOCK,
) -> Weight:
    """The Weight of `weight` [E,N,C]. encoded: values and scales in the published layout, and if they are exact."""
    _, rows, cols = weight.shape
    published = [tensor for tensor in encoded if isinstance(tensor, Tensor)]
    tensors: dict[str, Any] = dict(_stored(form.name, published, parts, block))
    return Weight(
        form.name, rows=rows, cols=cols, dtype=weight.dtype, parts=parts, group_size=group_size,
        is_exact=encoded.lossless, **tensors,
    )  # fmt: skip


def _saved(form: Form, weight: Weight, block: tuple[int, int] = minifloat.BLOCK) -> dict[str, Tensor]:
    """The published layout of a weight, by suffix."""
    assert weight.scales is not None
    sizes = (weight.rows, weight.cols, weight.parts)
    published: tuple[Tensor, ...] = minifloat.from_blocks(weight.data, weight.scales, form.name, *sizes, block)
    if weight.row_scales is not None:
        published = (*published, minifloat.from_row_scales(weight.row_scales, weight.parts))
    return dict(zip(form.suffixes, published, strict=True))


def _loaded(
    form: Form,
    tensors: dict[str, Tensor],
    now: Weight,
    expected: tuple[tuple[tuple[int, ...], torch.dtype], ...],
    block: tuple[int, int] = minifloat.BLOCK,
) -> Weight:
    """The weight of published tensors. expected: the shape and dtype of each suffix's tensor."""
    check_loaded(tensors, dict(zip(form.suffixes, expected, strict=True)))
    published = [tensors[suffix].to(now.device) for suffix in form.suffixes]
    return now.with_tensors(_stored(form.name, published, now.parts, block))


@dataclass(frozen=True)
class Fp8(KeyedForm):
    """e4m3fn, with one float32 scale per 128 x 128 weights, or per row (block="row")."""

    name: ClassVar[str] = "fp8"
    block: str = "128x128"

    def __post_init__(self) -> None:
        check_choice("block", self.block, tuple(BLOCKS))

    @property
    def suffixes(self) -> tuple[str, ...]:
        return ("", "_scale_inv")

    @property
    def _group(self) -> tuple[int, int]:
        return BLOCKS[self.block]

    def encode(self, name: str, weight: Tensor, parts: int) -> Weight | str:
        encoded = minifloat.encode_fp8(weight.detach(), self._group, parts, name)
        return _encoded(self, weight, parts, encoded, self._group[1], self._group)

    def save(self, weight: Weight) -> dict[str, Tensor]:
        values, scales = _saved(self, weight, self._group).values()
        return {"": values.view(torch.float8_e4m3fn), "_scale_inv": scales.contiguous()}

    def load(self, tensors: dict[str, Tensor], now: Weight) -> Weight:
        rows, cols, (height, width) = now.rows, now.cols, self._group
        groups = (now.parts * -(-(rows // now.parts) // height), -(-cols // (width or cols)))
        expected = ((now.shape, torch.float8_e4m3fn), ((now.shape[0], *groups), torch.float32))
        return _loaded(self, tensors, now, expected, self._group)


@dataclass(frozen=True)
class Mxfp4(KeyedForm):
    """e2m1, with one power-of-two scale per 32 columns of a row (OCP Microscaling v1.0)."""

    name: ClassVar[str] = "mxfp4"

    @property
    def suffixes(self) -> tuple[str, ...]:
        return ("_blocks", "_scales")

    def encode(self, name: str, weight: Tensor, parts: int) -> Weight | str:
        return _encoded(self, weight, parts, minifloat.encode_mxfp4(weight.detach(), name), minifloat.COLUMNS)

    def save(self, weight: Weight) -> dict[str, Tensor]:
        return _saved(self, weight)

    def load(self, tensors: dict[str, Tensor], now: Weight) -> Weight:
        experts, rows, cols = now.shape
        groups = -(-cols // minifloat.COLUMNS)
        expected = (((experts, rows, groups, 16), torch.uint8), ((experts, rows, groups), torch.uint8))
        return _loaded(self, tensors, now, expected)


@dataclass(frozen=True)
class Nf4(KeyedForm):
    """16 quantiles of the normal distribution, with one float32 scale per 64 columns of a row (QLoRA)."""

    name: ClassVar[str] = "nf4"

    @property
    def suffixes(self) -> tuple[str, ...]:
        return ("_codes", "_absmax")

    def encode(self, name: str, weight: Tensor, parts: int) -> Weight | str:
        return _encoded(self, weight, parts, nf4.encode_nf4(weight.detach(), name), minifloat.NF4_BLOCK)

    def save(self, weight: Weight) -> dict[str, Tensor]:
        return _saved(self, weight)

    def load(self, tensors: dict[str, Tensor], now: Weight) -> Weight:
        experts, rows, cols = now.shape
        groups = -(-cols // minifloat.NF4_BLOCK)
        expected = (((experts, rows, -(-cols // 2)), torch.uint8), ((experts, rows, groups), torch.float32))
        return _loaded(self, tensors, now, expected)


@dataclass(frozen=True)
class Nvfp4(KeyedForm):
    """e2m1, with one e4m3 scale per 16 columns of a row, and one float32 for each expert, or each part of its rows."""

    name: ClassVar[str] = "nvfp4"

    @property
    def suffixes(self) -> tuple[str, ...]:
        return ("_packed", "_scale", "_scale_2")

    def encode(self, name: str, weight: Tensor, parts: int) -> Weight | str:
        encoded = minifloat.encode_nvfp4(weight.detach(), parts, name)
        return _encoded(self, weight, parts, encoded, minifloat.NVFP4_BLOCK)

    def save(self, weight: Weight) -> dict[str, Tensor]:
        saved = _saved(self, weight)
        return saved | {"_scale": saved["_scale"].view(torch.float8_e4m3fn)}

    def load(self, tensors: dict[str, Tensor], now: Weight) -> Weight:
        experts, rows, cols = now.shape
        groups = -(-cols // minifloat.NVFP4_BLOCK)
        expected = (
            ((experts, rows, -(-cols // 2)), torch.uint8),
            ((experts, rows, groups), torch.float8_e4m3fn),
            ((experts, now.parts), torch.float32),
        )
        return _loaded(self, tensors, now, expected)
