# SPDX-License-Identifier: BSD-3-Clause
"""What a module has in place of parameters whose experts are in a store: stored projections without buffers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from switchgear.weights.form import Form, Layout
from switchgear.weights.module import Projection, StoredProjections
from switchgear.weights.weight import Weight


class Wave(NamedTuple):
    """Experts that are in memory now."""

    low: int
    high: int  # the last one
    is_whole: bool  # whether these are all experts of the call


@dataclass(frozen=True)
class OffloadedForm(Form):
    """What `stored as …` says of such experts. It encodes nothing."""

    name: ClassVar[str] = "offloaded"
    undo: ClassVar[str] = "close() of what offload returned"
    path: str

    def encode(self, name: str, weight: Tensor, parts: int) -> str:
        return f"its experts are in the store {self.path}; load the state dict before offload"

    def __str__(self) -> str:
        return f"offloaded to {self.path}"


class InStore(Tensor):
    """An entry of a state dict whose numbers are in a store. It has shape and dtype; whatever reads or writes its
    numbers, copies or pickles it raises a ValueError."""

    path: str

    @staticmethod
    def of(shape: tuple[int, ...], dtype: torch.dtype, path: str) -> InStore:
        made: Any = Tensor._make_wrapper_subclass(InStore, shape, dtype=dtype, device=torch.device("meta"))
        made.path = path
        return made  # type: ignore[no-any-return]

    def _refuse(self, *_: Any) -> NoReturn:
        raise ValueError(
            f"state dict: the experts {list(self.shape)} are in the store {self.path} and not in memory; leave them "
            "out, call switchgear.offload.save_pretrained(model, path), or close() of what offload returned first"
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"InStore({list(self.shape)}, {self.dtype}, {self.path!r})"

    __reduce_ex__ = __deepcopy__ = __copy__ = _refuse

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))._refuse()


class OffloadedProjections(StoredProjections):
    """Has no buffers: the weights are views of the cache. records: what the store said of them, checksums too."""

    form: OffloadedForm

    def __init__(
        self,
        form: OffloadedForm,
        layout: Layout,
        projections: tuple[Projection, Projection],
        weights: tuple[Any, Any],
        records: object,
    ) -> None:
        super().__init__(form, layout, projections)
        self.records = records
        self._weights: tuple[Any, Any] | None = weights
        self._num_experts = weights[0].shape[0]

    def close(self) -> None:
        """From now on a call raises an error."""
        self._weights = None

    def freeze(self, module: nn.Module) -> None:
        self.projections = self._frozen()  # in place: the cache holds this object, too

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

    @property
    def is_in_memory(self) -> bool:
        """Whether all experts are: a cache that is inert."""
        return self._weights is not None and isinstance(self._weights[0], Weight)

    def saved(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Entries without numbers, so that adapters and the rest can be saved."""
        if self.is_in_memory:
            for name, tensor in super().saved(module):
                yield name, tensor.contiguous()  # a view of records
            return
        for name, projection in zip(self.layout.names, self.projections, strict=True):
            kind = projection.kind
            sizes = (kind.cols, kind.rows) if self.layout.transposed else (kind.rows, kind.cols)
            yield name, InStore.of((self._num_experts, *sizes), kind.dtype, self.form.path)

    def put_into(self, module: nn.Module, weights: tuple[Weight, ...]) -> None:
        pass

    def take_out_of(self, module: nn.Module) -> None:
        pass

    def check_restore(self) -> None:
        raise ValueError(f"model: its experts are {self.form}; call close() of what offload returned instead")

    def load(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, missing: list[str]) -> None:
        self.check_load(module, state_dict, prefix)

    def check_load(self, module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
        for name in self.layout.names:
            if f"{prefix}{name}" in state_dict:
                raise ValueError(
                    f"{prefix}{name}: expected none for experts {self.form}, got one; leave the experts' keys out "
                    "to load the rest, load the state dict before offload, or write another store"
                )

    def _refuse_copy(self, *_: Any) -> NoReturn:
        raise TypeError(
            f"model: its experts are {self.form}, and a cache cannot be copied or pickled; copy the model before "
            "offload, or call close() of what offload returned"
        )

    __deepcopy__ = __copy__ = __reduce_ex__ = __getstate__ = _refuse_copy
