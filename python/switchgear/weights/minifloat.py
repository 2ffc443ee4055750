# SPDX-License-Identifier: BSD-3-Clause
"""Fp8, Mxfp4 and Nf4: numbers of 8 or 4 bits with scales, as DeepSeek-V3, Qwen3 and gpt-oss publish them, and as
QLoRA and bitsandbytes store them; see reference/minifloat.py and reference/nf4.py.

State dicts have the published layout, for saving and loading: fp8 as <name> float8_e4m3fn [E,N,C] and
<name>_scale_inv, mxfp4 as <name>_blocks [E,N,C/32,16] and <name>_scales, nf4 as <name>_codes [E,N,C/2] and
<name>_absmax. Weights are decoded and multiplied in floating point. Gradients reach x, topk_weights and biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from switchgear.reference import minifloat, nf4
from switchgear.weights.form import KeyedForm, check_loaded, on_huge_pages
from switchgear.weights.weight import Weight

BLOCKS = {"128x128": minifloat.BLOCK, "row": minifloat.ROW}


def _stored(
    format: str, published: tuple[Tensor, Tensor], parts: int, group: tuple[int, int] = minifloat.BLOCK
) -> dict[str, Tensor]:
    """Converts the published layout to the tensors of a Weight."""
    data, scales = minifloat.to_blocks(*published, format, parts, group)
    return {"data": on_huge_pages(data), "scales": on_huge_pages(scales)}


@dataclass(frozen=True)
class Fp8(KeyedForm):
    """e4m3fn, with one float32 scale per 128 x 128 weights, or per row (block="row")."""

    name: ClassVar[str] = "fp8"
    block: str = "128x128"

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise ValueError(f"block: expected one of {', '.join(BLOCKS)}, got {self.block!r}")

    @property
    def suffixes(self) -> tuple[str, ...]:
        return ("", "_scale_inv")

    @property
    def _group(self) -> tuple[int, int]:
        return BLOCKS[self.block]

    def encode(self, name: str, weight: Tensor, parts: int) -> Weight | str:
        values, scales, is_exact = minifloat.encode_fp8(weight.detach(), self._group, parts, name)
        _, rows, cols = weight.shape
        tensors = _stored("fp8", (values, scales), parts, self._group)
        return Weight(
            "fp8", tensors["data"], rows, cols, weight.dtype, tensors["scales"], parts=parts,
            group_size=self._group[1], is_exact=is_exact,
        )  # fmt: skip

    def save(self, weight: Weight) -> dict[str, Tensor]:
        assert weight.scales is not None
        values, scales = minifloat.from_blocks(
            weight.data, weight.scales, "fp8", weight.rows, weight.cols, weight.parts, self._group
        )
        return {"": values.view(torch.float8_e4m3fn), "_scale_inv": scales.contiguous()}

    def load(self, tensors: dict[str, Tensor], now: Weight) -> Weight:
        rows, cols, (height, width) = now.rows, now.cols, self._group
        groups = (now.parts * -(-(rows // now.parts) // height), -(-cols // (width or cols)))
        check_loaded(
            tensors,
            {
                "": (now.shape, torch.float8_e4m3fn),
                "_scale_inv": ((now.shape[0], *groups), torch.float32),
            },
        )
        published = (tensors[""].to(now.device), tensors["_scale_inv"].to(now.device))
        return now.with_tensors(_stored("fp8", published, now.parts, self._group))


@dataclass(frozen=True)
class Mxfp4(KeyedForm):
    """e2m1, with one power-of-two scale per 32 columns of a row (OCP Microscaling v1.0)."""

    name: ClassVar[str] = "mxfp4"

    @property
    def suffixes(self) -> tuple[str, ...]:
        return ("_blocks", "_scales")

    def encode(self, name: str, weight: Tensor, parts: int) -> Weight | str:
        blocks, scales, is_exact = minifloat.encode_mxfp4(weight.detach(), name)
        _, rows, cols = weight.shape
        tensors = _stored("mxfp4", (blocks, scales), parts)
        return Weight(
            "mxfp4", tensors["data"], rows, cols, weight.dtype, tensors["scales"], parts=parts,
            group_size=minifloat.COLUMNS, is_exact=is_exact,
        )  # fmt: skip

    def save(self, weight: Weight) -> dict[str, Tensor]:
        assert weight.scales is not None
        blocks, scales = minifloat.from_blocks(
            weight.data, weight.scales, "mxfp4", weight.rows, weight.cols, weight.parts
        )
        return {"_blocks": blocks, "_scales": scales}

    def load(self, tensors: dict[str, Tensor], now: Weight) -> Weight:
        experts, rows, cols = now.shape
        groups = -(-cols // minifloat.COLUMNS)
        check_loaded(
            tensors,
            {"_blocks": ((experts, rows, groups, 16), torch.uint8), "_scales": ((experts, rows, groups), torch.uint8)},
        )
        published = (tensors["_blocks"].to(now.device), tensors["_scales"].to(now.device))
        return now.with_tensors(_stored("mxfp4", published, now.parts, minifloat.BLOCK))


@dataclass(frozen=True)
class Nf4(KeyedForm):
    """16 quantiles of the normal distribution, with one float32 scale per 64 columns of a row (QLoRA)."""

    name: ClassVar[str] = "nf4"

    @property
    def suffixes(self) -> tuple[str, ...]:
        return ("_codes", "_absmax")

    def encode(self, name: str, weight: Tensor, parts: int) -> Weight | str:
        codes, absmax, is_exact = nf4.encode_nf4(weight.detach(), name)
        _, rows, cols = weight.shape
        tensors = _stored("nf4", (codes, absmax), parts)
        return Weight(
            "nf4", tensors["data"], rows, cols, weight.dtype, tensors["scales"], parts=parts,
            group_size=minifloat.NF4_BLOCK, is_exact=is_exact,
        )  # fmt: skip

    def save(self, weight: Weight) -> dict[str, Tensor]:
        assert weight.scales is not None
        codes, absmax = minifloat.from_blocks(weight.data, weight.scales, "nf4", weight.rows, weight.cols, weight.parts)
        return {"_codes": codes, "_absmax": absmax}

    def load(self, tensors: dict[str, Tensor], now: Weight) -> Weight:
        experts, rows, cols = now.shape
        groups = -(-cols // minifloat.NF4_BLOCK)
        check_loaded(
            tensors,
            {
                "_codes": ((experts, rows, -(-cols // 2)), torch.uint8),
                "_absmax": ((experts, rows, groups), torch.float32),
            },
        )
        published = (tensors["_codes"].to(now.device), tensors["_absmax"].to(now.device))
        return now.with_tensors(_stored("nf4", published, now.parts))
