# SPDX-License-Identifier: BSD-3-Clause
"""Form: a way to store a weight, with its options. Each of the others in this folder is one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from switchgear.weights.pages import advise_huge_pages
from switchgear.weights.weight import Weight


@dataclass(frozen=True)
class Form:
    """How a weight is stored; frozen and comparable, so that two modules can be seen to have the same."""

    name: ClassVar[str]  # of the format, and what `store` calls it
    devices: ClassVar[tuple[str, ...] | None] = None  # types of devices that can hold it; None: any
    one_dtype: ClassVar[bool] = False  # both projections of a layer need the same dtype

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the keys <name><suffix> under which a state dict has the weight; none: as a plain weight, <name>."""
        return ()

    def encode(self, name: str, weight: Tensor, parts: int) -> Weight | str:
        """A weight [E,N,C] in this form, or why it cannot be. ValueError where its numbers are not finite.

        parts: 2 where the rows are gates and then ups, which are stored apart; else 1.
        """
        raise NotImplementedError

    def save(self, weight: Weight) -> dict[str, Tensor]:
        """What a state dict has of a weight, by suffix."""
        raise NotImplementedError

    def load(self, tensors: dict[str, Tensor], now: Weight) -> Weight:
        """The weight of which a state dict has `tensors`, by suffix, in place of `now`. ValueError, after the suffix,
        for one of another shape or form."""
        raise NotImplementedError

    def __str__(self) -> str:
        options = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{self.name}({', '.join(options)})" if options else self.name


def on_huge_pages(tensor: Tensor) -> Tensor:
    """A contiguous copy in memory that asks for huge pages."""
    copy = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    advise_huge_pages(copy)
    return copy.copy_(tensor)


def check_loaded(tensors: dict[str, Tensor], saved: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """ValueError unless tensors have the shapes and dtypes of `saved`, both by suffix."""
    for suffix, (shape, dtype) in saved.items():
        got = tensors[suffix]
        if tuple(got.shape) != shape or got.dtype is not dtype:
            raise ValueError(f"{suffix}: expected {dtype} {list(shape)}, got {got.dtype} {list(got.shape)}")
