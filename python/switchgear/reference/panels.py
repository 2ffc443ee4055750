# SPDX-License-Identifier: BSD-3-Clause
"""Weights in panels in plain torch: their elements in the order in which an ISA's kernels read them. The specification.

The kernels sum a dot product in lanes: lane l sums words l, l + L, … of a chunk, then lanes are added in pairs. In a
panel, adjacent words belong to the same lane of adjacent rows. One word of an activation is then multiplied by many
weights, and a panel is read as one stream. Sums have the same bits as with plain weights. For AMX, the vectors are
tiles of 16 rows and 32 columns: two tiles of rows advance together along the columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1024  # words: 4 bytes, or one element that the kernels widen to 4 bytes
COLUMNS = 32  # C is a multiple of it: all lanes of any ISA, two elements per word
WIDE = 2  # vectors, or tiles, per group
TILE = (16, 32)  # rows and columns of an AMX tile of bfloat16
TILE_BYTES = 1024

# The lanes of an ISA in the order of their addition, by rows of a panel and number of lanes.
_LANES = {
    (64, 16): (0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15),  # AVX-512
    (16, 8): (0, 2, 4, 6, 1, 3, 5, 7),  # AVX2
    (16, 4): (0, 1, 2, 3),  # NEON
    (8, 4): (0, 2, 1, 3),  # generic
}


class PanelLayout(NamedTuple):
    """The order of panels, which follows from their shape [E,N/rows,V,vector_bytes]."""

    rows: int  # rows of the weight per panel
    vector_bytes: int  # size of a kernel's vector

    def lanes(self, dtype: torch.dtype) -> tuple[int, ...]:
        """The kernel's lanes in the order of their sums. A vector holds one word from each of as many rows."""
        per_word = 2 if self.vector_bytes == 64 and dtype is torch.bfloat16 else 1  # AVX-512-BF16 multiplies pairs
        lanes = _LANES.get((self.rows, self.vector_bytes // (per_word * dtype.itemsize)))
        if lanes is None:
            raise ValueError(f"weight: expected panels of {dtype} for a known ISA, got {self}")
        return lanes


def shape_of(weight: Tensor, layout: PanelLayout) -> tuple[int, int, int, int]:
    """The shape [E,N/rows,V,vector_bytes] of panels. N must be a multiple of layout.rows, C of COLUMNS."""
    num_experts, rows, columns = weight.shape
    vectors = layout.rows * columns * weight.itemsize // layout.vector_bytes
    return num_experts, rows // layout.rows, vectors, layout.vector_bytes


def pack(weight: Tensor, layout: PanelLayout, out: Tensor | None = None) -> Tensor:
    """Packs a weight into panels, uint8. Writes to `out` if given."""
    panels = torch.empty(shape_of(weight, layout), dtype=torch.uint8, device=weight.device) if out is None else out
    for plain, packed in _lanes_of(weight.contiguous(), panels, layout):
        packed.copy_(plain)
    return panels


def expand(panels: Tensor, out: Tensor) -> Tensor:
    """Expands panels to the weight [E,N,C] in `out`."""
    layout = PanelLayout(out.shape[1] // max(panels.shape[1], 1), panels.shape[3])
    for plain, packed in _lanes_of(out, panels.contiguous(), layout):
        plain.copy_(packed)
    return out


def check_storage(name: str, panels: Tensor, rows: int, columns: int, dtype: torch.dtype) -> None:
    """Checks that these are panels of some ISA for weights [E,rows,columns] of `dtype`."""
    if panels.dtype is not torch.uint8:
        raise TypeError(f"{name}: expected torch.uint8, got {panels.dtype}")
    if panels.dim() == 4 and panels.shape[1] and not rows % panels.shape[1] and not columns % COLUMNS:
        layout = PanelLayout(rows // panels.shape[1], panels.shape[3])
        vectors, rest = divmod(layout.rows * columns * dtype.itemsize, max(layout.vector_bytes, 1))
        if not rest and panels.shape[2] == vectors:
            if layout.vector_bytes != TILE_BYTES:
                layout.lanes(dtype)
            return
    raise ValueError(
        f"{name}: expected panels [E, N/rows, vectors, bytes] of [{rows}, {columns}], got shape {list(panels.shape)}"
    )


def plain(panels: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Expands panels to a new weight [E,N,C]."""
    rows = panels.shape[1] * panels.shape[2] * panels.shape[3] // (columns * dtype.itemsize)
    return expand(panels, torch.empty(panels.shape[0], rows, columns, dtype=dtype, device=panels.device))


def _lanes_of(weight: Tensor, panels: Tensor, layout: PanelLayout) -> Iterator[tuple[Tensor, Tensor]]:
    """For each chunk and lane, views of the same words, [E, panel, group, step, vector, row], as integers; or tiles."""
    if layout.vector_bytes == TILE_BYTES:
        yield _tiles_of(weight, panels, layout)
        return
    lanes = layout.lanes(weight.dtype)
    count, word_bytes = len(lanes), layout.vector_bytes // len(lanes)
    bits = {2: torch.int16, 4: torch.int32}[word_bytes]
    num_experts, num_panels = panels.shape[:2]
    groups = layout.rows // count // WIDE
    classes = groups  # adjacent lanes: as many as the registers allow
    words = weight.view(bits).view(
        num_experts, num_panels, groups, WIDE, count, weight.shape[2] * weight.itemsize // word_bytes
    )
    flat = panels.view(bits).view(num_experts, num_panels, layout.rows * words.shape[-1])
    for first in range(0, words.shape[-1], CHUNK):
        chunk = words[..., first : first + CHUNK]
        steps = chunk.shape[-1] // count
        by_lane = chunk.view(*chunk.shape[:-1], steps, count).permute(0, 1, 2, 5, 3, 4, 6)
        block = flat[..., first * layout.rows : (first + steps * count) * layout.rows]
        sets = block.view(num_experts, num_panels, count // classes, groups, steps, classes, WIDE, count)
        for place, lane in enumerate(lanes):
            yield by_lane[..., lane], sets[:, :, place // classes, :, :, place % classes]


def _tiles_of(weight: Tensor, panels: Tensor, layout: PanelLayout) -> tuple[Tensor, Tensor]:
    """Views of both tensors as [E, panel, pair of tiles, step, tile, row, column]."""
    if weight.dtype is not torch.bfloat16:
        raise ValueError(f"weight: expected panels of {weight.dtype} for a known ISA, got {layout}")
    num_experts, num_panels = panels.shape[:2]
    pairs, steps = layout.rows // (WIDE * TILE[0]), weight.shape[2] // TILE[1]
    plain = weight.view(num_experts, num_panels, pairs, WIDE, TILE[0], steps, TILE[1]).permute(0, 1, 2, 5, 3, 4, 6)
    return plain, panels.view(weight.dtype).view(plain.shape)
