# SPDX-License-Identifier: BSD-3-Clause
"""Fp8, Mxfp4, Nf4 and Nvfp4: numbers of 8 or 4 bits with scales, as DeepSeek-V3, Qwen3 and gpt-oss publish them, as
QLoRA and bitsandbytes store them, and as ModelOpt writes them; see reference/minifloat.py and reference/nf4.py.

State dicts have the published layout, for saving and loading: fp8 as <name> float8_e4m3fn [E,N,C] and
<name>_scale_inv, mxfp4 as <name>_blocks [E,N,C/32,16] and <name>_scales, nf4 as <name>_codes [E,N,C/2] and
<name>_absmax, nvfp4 as <name>_packed [E,N,C/2], <name>_scale float8_e4m3fn [E,N,C/16] and <name>_scale_2 float32
[E,parts]. Weights are decoded and multiplied in floating point. Gradients reach x, topk_weights and biases.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from switchgear.checks import checked
from switchgear.reference import minifloat, nf4
from switchgear.reference.checks import divide_up
from switchgear.weights.form import KeyedForm, empty_tensor, encode_experts, has_encoder, on_huge_pages
from switchgear.weights.weight import Weight

__all__ = ["Fp8", "Mxfp4", "Nf4", "Nvfp4"]

BLOCKS = {"128x128": minifloat.BLOCK, "64x128": (64, 128), "row": minifloat.ROW}


class _Minifloat(KeyedForm):
    _published: ClassVar[tuple[str, ...]]  # suffixes of values and scales
    _as_fp8: ClassVar[str | None] = None  # the suffix whose bytes are float8_e4m3fn

    @property
    def suffixes(self) -> tuple[str, ...]:
        return self._published

    @property
    def _block_shape(self) -> tuple[int, int]:
        """Rows and columns that share a scale of fp8."""
        return minifloat.BLOCK

    @abstractmethod
    def _publish(self, weight: Tensor, parts: int, name: str) -> minifloat.Encoded | minifloat.EncodedNvfp4:
        """The published layout."""

    def encode(self, name: str, weight: Tensor, parts: int) -> Weight | str:
        (num_experts, rows, cols), kind = weight.shape, minifloat.MINIFLOATS[self.name]
        group_size, is_exact = kind.group or self._block_shape[1], False
        tensors: dict[str, Any] = {}
        if has_encoder(weight):
            shape = minifloat.blocks_shape(rows, cols, self.name, parts)
            scales = num_experts, shape[0], divide_up(cols, group_size or cols), minifloat.ROWS
            tensors = {"data": empty_tensor(num_experts, *shape), "scales": empty_tensor(*scales, dtype=kind.scales)}
            if kind.row_scales:
                tensors["row_scales"] = empty_tensor(*scales[:2], minifloat.ROWS, dtype=torch.float32)
        else:
            *published, is_exact = self._publish(weight.detach(), parts, name)
            tensors |= self._store(published, parts)
        encoded = Weight(
            self.name, rows=rows, cols=cols, dtype=weight.dtype, parts=parts, group_size=group_size, is_exact=is_exact,
            **tensors,
        )  # fmt: skip
        return encode_experts(name, weight, encoded, self._block_shape[0]) if has_encoder(weight) else encoded

    def _store(self, published: Sequence[Any], parts: int) -> dict[str, Tensor]:
        """The tensors of a Weight."""
        values, scales, *tensor_scales = published
        data, stored = minifloat.to_blocks(values, scales, self.name, parts, self._block_shape)
        tensors = {"data": on_huge_pages(data), "scales": on_huge_pages(stored)}
        for each in tensor_scales:
            tensors["row_scales"] = minifloat.to_row_scales(each, values.shape[1])
        return tensors

    def save(self, weight: Weight) -> dict[str, Tensor]:
        assert weight.scales is not None
        sizes = (weight.rows, weight.cols, weight.parts)
        published: tuple[Tensor, ...] = minifloat.from_blocks(
            weight.data, weight.scales, self.name, *sizes, self._block_shape
        )
        if weight.row_scales is not None:
            published = (*published, minifloat.from_row_scales(weight.row_scales, weight.parts))
        return {
            suffix: tensor.view(torch.float8_e4m3fn) if suffix == self._as_fp8 else tensor.contiguous()
            for suffix, tensor in zip(self.suffixes, published, strict=True)
        }

    def load(self, tensors: dict[str, Tensor], now: Weight) -> Weight:
        published = [tensors[suffix].to(now.device) for suffix in self.suffixes]
        return now.with_tensors(self._store(published, now.parts))


@checked
@dataclass(frozen=True)
class Fp8(_Minifloat):
    """e4m3fn, with one float32 scale per 128 x 128 weights, per 64 rows and 128 columns (block="64x128"), or per row
    (block="row")."""

    name: ClassVar[str] = "fp8"
    _published: ClassVar[tuple[str, ...]] = ("", "_scale_inv")
    _as_fp8: ClassVar[str | None] = ""
    block: Literal["128x128", "64x128", "row"] = "128x128"

    @property
    def _block_shape(self) -> tuple[int, int]:
        return BLOCKS[self.block]

    def _publish(self, weight: Tensor, parts: int, name: str) -> minifloat.Encoded:
        return minifloat.encode_fp8(weight, self._block_shape, parts, name)


@dataclass(frozen=True)
class Mxfp4(_Minifloat):
    """e2m1, with one power-of-two scale per 32 columns of a row (OCP Microscaling v1.0)."""

    name: ClassVar[str] = "mxfp4"
    _published: ClassVar[tuple[str, ...]] = ("_blocks", "_scales")

    def _publish(self, weight: Tensor, parts: int, name: str) -> minifloat.Encoded:
        return minifloat.encode_mxfp4(weight, name)


@dataclass(frozen=True)
class Nf4(_Minifloat):
    """16 quantiles of the normal distribution, with one float32 scale per 64 columns of a row (QLoRA)."""

    name: ClassVar[str] = "nf4"
    _published: ClassVar[tuple[str, ...]] = ("_codes", "_absmax")

    def _publish(self, weight: Tensor, parts: int, name: str) -> minifloat.Encoded:
        return nf4.encode_nf4(weight, name)


@dataclass(frozen=True)
class Nvfp4(_Minifloat):
    """e2m1, with one e4m3 scale per 16 columns of a row, and one float32 for each expert, or each part of its rows."""

    name: ClassVar[str] = "nvfp4"
    _published: ClassVar[tuple[str, ...]] = ("_packed", "_scale", "_scale_2")
    _as_fp8: ClassVar[str | None] = "_scale"

    def _publish(self, weight: Tensor, parts: int, name: str) -> minifloat.EncodedNvfp4:
        return minifloat.encode_nvfp4(weight, parts, name)
