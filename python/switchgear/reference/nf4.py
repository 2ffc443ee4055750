# SPDX-License-Identifier: BSD-3-Clause
"""nf4, the 4-bit format of QLoRA (arXiv:2305.14314), in plain torch: encoding and decoding. The specification.

    w = absmax · value

absmax, float32, is the largest magnitude of 64 columns of a row. value is one of 16 numbers from -1 to 1: quantiles of
the normal distribution. If C is a multiple of 64, the published layout is that of bitsandbytes. minifloat.py converts
it to that of the kernels.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from switchgear.reference.minifloat import NF4_BLOCK, Encoded, decode_pairs, encode_experts, encode_rows, pad_zeros

# Of codes 0..15, from the paper's appendix E, as float32.
VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


# Between neighbouring values, exact in float64; then the largest float32 that are not above: what is above one is above
# the other.
_MIDDLES = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(VALUES)], dtype=torch.float64, device="cpu")
_NEAREST = _MIDDLES.float()
_BELOW = _NEAREST.nextafter(_NEAREST.new_tensor(-torch.inf))
THRESHOLDS = tuple(torch.where(_NEAREST > _MIDDLES, _BELOW, _NEAREST).tolist())


def nf4_codes(x: Tensor) -> Tensor:
    """Rounds float32 to the nearest value; a tie goes to the lower one, as in bitsandbytes. uint8, 0..15."""
    return torch.bucketize(x, x.new_tensor(THRESHOLDS), out_int32=True).to(torch.uint8)


def encode_nf4(weight: Tensor, name: str = "weight") -> Encoded:
    """Encodes a weight [E,N,C] in nf4: absmax of 64 columns; value = weight / absmax in float32, to the nearest.

    A block of zeros has absmax 0; zeros lose their signs. The largest distance of neighbours is 0.3038, so that

        |w - absmax · value| <= 0.152 · absmax

    Each block but those of zeros has a code 0 or 15. A weight that has such blocks and is decoded to float32 is encoded
    exactly, byte by byte. If it is decoded to a narrower dtype, its absmax is rounded.

    ValueError for NaN and infinities; it names the weight by `name`.
    """
    columns = weight.shape[-1]

    def encode(w: Tensor) -> tuple[Tensor, Tensor]:
        blocks = pad_zeros(w, -columns % NF4_BLOCK).view(len(w), -(-columns // NF4_BLOCK), NF4_BLOCK)
        absmax = blocks.abs().amax(-1)
        codes = nf4_codes(blocks / torch.where(absmax == 0, 1.0, absmax)[..., None]).flatten(1)
        return (codes[:, ::2] << 4 | codes[:, 1::2])[:, : -(-columns // 2)], absmax

    (values, absmax), lossless = encode_experts(
        weight, name, lambda w: encode_rows(w, encode), lambda v, s: decode_nf4(v, s, columns)
    )
    return Encoded(values, absmax, lossless)


def decode_nf4(values: Tensor, absmax: Tensor, columns: int | None = None) -> Tensor:
    """Decodes published nf4 to [E,N,C]: absmax · value in float32, rounded once. Pass `columns`, C, if it is odd."""
    columns = 2 * values.shape[2] if columns is None else columns
    return decode_pairs(values, VALUES, columns, absmax, NF4_BLOCK, 1)
