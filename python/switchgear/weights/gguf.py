# SPDX-License-Identifier: BSD-3-Clause
"""The forms q8_0, q4_0, …, iq4_xs: the block types of GGUF files, in the files' bytes; see reference/gguf.py.

A state dict has <name>_bytes [E,N,bytes of a row] uint8. Weights in memory may be views of a mapped file. Gradients
reach x, topk_weights, biases and adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from switchgear.reference import gguf
from switchgear.reference.minifloat import finite_experts
from switchgear.weights.form import (
    FORMS,
    Form,
    KeyedForm,
    empty_tensor,
    encode_experts,
    encode_matrix,
    has_encoder,
    on_huge_pages,
)
from switchgear.weights.weight import Weight

SUFFIX = "_bytes"


def gguf_weight(name: str, data: Tensor, cols: int, dtype: torch.dtype) -> Weight:
    """The weight of rows in blocks, [E, parts, N/parts, bytes of a row] uint8, without a copy. dtype: of plain()."""
    return Weight(name, data, data.shape[1] * data.shape[2], cols, dtype, parts=data.shape[1])


def encode_rows(kind: str, rows: Tensor, name: str = "rows") -> Tensor:
    """reference.gguf.encode, by a kernel with the same bits where it can. ValueError, by `name`, unless all numbers are
    finite."""
    label = f"{name}: expected finite numbers to encode as {kind}, it"
    if not has_encoder(rows):
        if not all(bool(row.isfinite().all()) for row in rows):
            raise ValueError(f"{label} has NaN or infinities")
        return gguf.encode(kind, rows)
    out = torch.empty(*rows.shape[:-1], gguf.row_bytes(kind, rows.shape[-1]), dtype=torch.uint8)
    encode_matrix(
        rows.flatten(0, -2) if rows.dim() > 1 else rows[None],
        gguf_weight(kind, out.view(1, 1, -1, out.shape[-1]), rows.shape[-1], rows.dtype),
        label,
    )
    return out


@dataclass(frozen=True)
class GgufForm(KeyedForm):
    """Blocks of a type; a class for each, by the name in FORMS."""

    def __reduce__(self) -> tuple[Any, ...]:
        return form_of, (self.name,)

    @property
    def suffixes(self) -> tuple[str, ...]:
        return (SUFFIX,)

    def encode(self, name: str, weight: Tensor, parts: int) -> Weight | str:
        columns = gguf.TYPES[self.name].columns
        if weight.shape[-1] % columns:
            return f"{name} has {weight.shape[-1]} columns, no multiple of {columns}"
        shape = len(weight), parts, weight.shape[1] // parts, gguf.row_bytes(self.name, weight.shape[-1])
        if has_encoder(weight):
            stored = gguf_weight(self.name, empty_tensor(*shape), weight.shape[-1], weight.dtype)
            return encode_experts(name, weight, stored)
        rows = torch.stack([gguf.encode(self.name, expert) for expert in finite_experts(weight, name)])
        return gguf_weight(self.name, on_huge_pages(rows.view(shape)), weight.shape[-1], weight.dtype)

    def save(self, weight: Weight) -> dict[str, Tensor]:
        return {SUFFIX: weight.data.flatten(1, 2)}

    def load(self, tensors: dict[str, Tensor], now: Weight) -> Weight:
        data = on_huge_pages(tensors[SUFFIX].to(now.device))
        return now.with_tensors({"data": data.view(len(data), *now.data.shape[1:])})


def form_of(name: str) -> Form:
    """The form of a type."""
    return FORMS[name]()


for _name in gguf.TYPES:
    type(f"GgufForm_{_name}", (GgufForm,), {"name": _name, "__module__": __name__})
