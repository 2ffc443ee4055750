# SPDX-License-Identifier: BSD-3-Clause
"""How rows look on the way between ranks: as they are, or in 8 bits with a scale per row.

    fp8    [R,H] → [R,H+4] bytes: float8 e4m3 of row / scale, then the scale = max |row| / 448 in float32

e4m3 has 3 fraction bits and a smallest step of 2^-9, so an element x of a row with largest magnitude m comes out as
x' with |x' - x| ≤ max(2^-4 |x|, 2^-10 · m / 448) (1 + 2^-22), plus the rounding to the dtype of the row. A row with an
element that is not finite comes out as NaN. A rank's rows for itself are encoded too, so results do not depend on the
placement.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_LARGEST = 448.0  # of e4m3fn
_SCALE_BYTES = 4


class Format(Protocol):
    exact: bool

    def row_bytes(self, hidden_size: int, item: int) -> int: ...

    def encode(self, rows: Tensor) -> Tensor:
        """[R,H] → what is sent: [R, …], contiguous."""
        ...

    def decode(self, sent: Tensor, dtype: torch.dtype) -> Tensor: ...

    def empty(self, count: int, like: Tensor) -> Tensor:
        """A buffer for `count` rows as wide as those of like, as they are sent."""
        ...


class Exact:
    exact = True

    def row_bytes(self, hidden_size: int, item: int) -> int:
        return hidden_size * item

    def encode(self, rows: Tensor) -> Tensor:
        return rows.contiguous()

    def decode(self, sent: Tensor, dtype: torch.dtype) -> Tensor:
        return sent

    def empty(self, count: int, like: Tensor) -> Tensor:
        return like.new_empty(count, like.shape[1])


class Fp8:
    exact = False

    def row_bytes(self, hidden_size: int, item: int) -> int:
        return hidden_size + _SCALE_BYTES

    def encode(self, rows: Tensor) -> Tensor:
        wide = rows.float()
        largest = wide.abs().amax(1, keepdim=True) if rows.shape[1] else wide.new_zeros(len(rows), 1)
        # Not below the smallest normal number, whose quotients are finite; a row of zeros stays one.
        scale = (largest / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        values = (wide / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        return torch.cat((values.view(torch.uint8), scale.view(torch.uint8)), 1)

    def decode(self, sent: Tensor, dtype: torch.dtype) -> Tensor:
        values = sent[:, :-_SCALE_BYTES].view(torch.float8_e4m3fn).float()
        scale = sent[:, -_SCALE_BYTES:].reshape(-1).clone().view(torch.float32)  # a copy is aligned
        return (values * scale[:, None]).to(dtype)

    def empty(self, count: int, like: Tensor) -> Tensor:
        return like.new_empty(count, like.shape[1] + _SCALE_BYTES, dtype=torch.uint8)


class Wire(NamedTuple):
    """The formats of rows on their way to the experts and back, in forward and in backward."""

    out: Format
    back: Format


WIRES = {
    "exact": Wire(Exact(), Exact()),
    "fp8": Wire(Fp8(), Fp8()),
    "fp8_dispatch": Wire(Fp8(), Exact()),  # results are summed and cost more if rounded
}
