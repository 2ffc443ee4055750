# SPDX-License-Identifier: BSD-3-Clause
"""Projections whose experts are in a store on disk, and in memory only while they are needed: what weights_of returns
for them, and what a module has in place of its parameters. The cache itself is in offload/."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor, nn

from switchgear.weights.form import Form
from switchgear.weights.layout import Layout
from switchgear.weights.module import Projection, StoredProjections
from switchgear.weights.weight import Weight


class Wave(NamedTuple):
    """Experts that are in memory now."""

    low: int
    high: int  # the last one
    is_whole: bool  # whether these are all experts of the call


class Source(Protocol):
    """Loads the experts of a layer."""

    def run(
        self,
        x: Tensor,
        topk_ids: Tensor,
        compute: Callable[[Iterator[Wave] | None], Tensor],
        *,
        together: bool = False,
    ) -> Tensor:
        """compute(waves), while the experts of topk_ids [T,K] int32 are loaded: None if all are in memory, else
        ascending ranges of experts, each resident until the next one is requested. together: all experts at once,
        or a ValueError."""


@dataclass(frozen=True, eq=False)
class OffloadedWeight:
    """A projection [E,N,C] of which some experts are in memory, where `weight` has slots."""

    weight: Weight
    source: Source

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def plain(self) -> NoReturn:
        raise ValueError(
            "model: its experts are offloaded, so their plain weights and state dict are not in memory; the store has "
            "them, or call close() of what offload returned, which restores the parameters"
        )


@dataclass(frozen=True)
class OffloadedForm(Form):
    """What `stored as …` says of such experts. It encodes nothing."""

    name: ClassVar[str] = "offloaded"
    path: str

    def encode(self, name: str, weight: Tensor, parts: int) -> str:
        return f"its experts are in the store {self.path}; load the state dict before offload"

    def __str__(self) -> str:
        return f"offloaded to {self.path}"


class OffloadedProjections(StoredProjections):
    """Has no buffers: the weights are views of the cache."""

    def __init__(
        self, form: OffloadedForm, layout: Layout, projections: tuple[Projection, Projection], weights: tuple[Any, Any]
    ) -> None:
        super().__init__(form, layout, projections)
        self._weights: tuple[Any, Any] | None = weights

    def close(self) -> None:
        """From now on a call raises an error."""
        self._weights = None

    @property
    def is_closed(self) -> bool:
        return self._weights is None

    def weights(self, module: nn.Module) -> tuple[Any, Any]:
        if (weights := self._weights) is None:
            raise RuntimeError(
                f"model: its experts were {self.form}, and the cache is closed; call offload.offload(model, store, …) "
                "again"
            )
        return weights

    def put_into(self, module: nn.Module, weights: tuple[Weight, Weight]) -> None:
        pass

    def take_out_of(self, module: nn.Module) -> None:
        pass

    def check_restore(self) -> None:
        raise ValueError(f"model: its experts are {self.form}; call close() of what offload returned instead")

    def load(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, missing: list[str]) -> None:
        for name in self.layout.names:
            if f"{prefix}{name}" in state_dict:
                raise ValueError(
                    f"{prefix}{name}: expected none for experts {self.form}, got one; load the state dict before "
                    "offload, or write another store"
                )

    def _refuse_copy(self, *_: Any) -> NoReturn:
        raise TypeError(
            f"model: its experts are {self.form}, and a cache cannot be copied or pickled; copy the model before "
            "offload, or call close() of what offload returned"
        )

    __deepcopy__ = __copy__ = __reduce_ex__ = __getstate__ = _refuse_copy
