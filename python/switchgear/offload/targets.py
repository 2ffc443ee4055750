# SPDX-License-Identifier: BSD-3-Clause
"""The modules of a model whose experts a store has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from switchgear.complaints import as_device
from switchgear.offload.store import Store
from switchgear.offload.store_records import Records
from switchgear.weights.form import Layout, hint_for, layout_of
from switchgear.weights.module import Kind, StoredProjections, stored_of
from switchgear.weights.offloaded import OffloadedProjections
from switchgear.weights.selected import selection_of
from switchgear.weights.store import wrapper_of


@dataclass(frozen=True)
class Target:
    name: str
    module: nn.Module
    layout: Layout
    records: Records
    stored: StoredProjections | None  # how the module stores its experts now

    def tensors(self) -> list[torch.Tensor]:
        """The experts' tensors that have numbers or are on meta."""
        if isinstance(self.stored, OffloadedProjections):
            return []
        if self.stored is not None:
            return [weight.data for weight in self.stored.weights(self.module)]
        return [self.module._parameters[name] for name in self.layout.names]  # type: ignore[misc]


def matched(model: nn.Module, store: Store) -> list[Target]:
    """In the order of the model. Raises ValueError, which names the module, if the store is not of this model."""
    found: list[Target] = []
    for name, module in model.named_modules():
        where = f"model.{name}" if name else "model"
        layout = layout_of(module)
        if layout is None:
            if name in store.layers:
                raise ValueError(
                    f"{where}: expected experts on the fused kernel, which the store has, got "
                    f"{type(module).__name__} ({hint_for(module)})"
                )
            continue
        if getattr(module, "parallel", None) is not None:
            raise ValueError(f"{where}: expected all experts in this process, got those of {module.parallel}")
        if name not in store.layers:
            raise ValueError(f"{where}: expected a store with its experts, got one of {_some(store)} in {store.path}")
        if (wrapper := wrapper_of(model, name)) is not None:
            raise ValueError(f"{where}: expected experts without adapters around them, got a {wrapper}")
        records = store.layers[name]
        _check(where, module, layout, records)
        found.append(Target(name, module, layout, records, stored_of(module)))
    if not found:
        raise ValueError(
            f"model: expected experts on the fused kernel; {type(model).__name__} has none ({hint_for(model)})"
        )
    if missing := sorted(set(store.layers) - {target.name for target in found}):
        raise ValueError(f"model: expected the experts of {missing[0]}, which the store {store.path} has, got none")
    return found


def place_of(model: nn.Module, targets: list[Target], wanted: torch.device | str | None) -> torch.device:
    """Where the experts run: `wanted`, or where they are, or where the rest of the model is."""
    held = {tensor.device for target in targets for tensor in target.tensors() if not tensor.is_meta}
    if wanted is None:
        rest = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
        place = min(held, key=str) if held else next(rest, torch.device("cpu"))
    else:
        place = as_device("device", wanted)
        if place.type == "cuda" and place.index is None and torch.cuda.is_available():
            place = torch.device("cuda", torch.cuda.current_device())
    for target in targets:
        if place.type != "cpu" and (kind := next((k for k in target.records.kinds if k.format in _HOST), None)):
            raise ValueError(f"{target.name}: expected a form with kernels for {place}, got {kind.format}")
    if wanted is None and len(held) > 1:
        raise ValueError(
            f"model: expected experts on one device, got {', '.join(sorted(map(str, held)))}; pass device="
        )
    return place


_HOST = ("panels", "compact")  # forms of the CPU's kernels


def _some(store: Store) -> str:
    names = list(store.layers)
    return ", ".join(names[:2]) + (", …" if len(names) > 2 else "")


def _check(where: str, module: nn.Module, layout: Layout, records: Records) -> None:
    if selection_of(module) is not None:
        raise ValueError(f"{where}: expected no experts that train alone: call switchgear.finetune.unfreeze(model)")
    stored = stored_of(module)
    if isinstance(stored, OffloadedProjections):
        if not stored.is_closed:
            raise ValueError(f"{where}: expected experts in memory, got some {stored.form}; close() that cache first")
        kinds = [projection.kind for projection in stored.projections]
    elif stored is not None:
        kinds = [Kind.of(weight) for weight in stored.weights(module)]
    else:
        kinds = []
    for index, kind in enumerate(records.kinds):
        name = layout.names[index]
        if kinds:
            if kinds[index]._replace(fields=(), is_exact=False) != kind._replace(fields=(), is_exact=False):
                raise ValueError(
                    f"{where}.{name}: expected a store in its form, {kinds[index].format} [{kinds[index].rows}, "
                    f"{kinds[index].cols}], got {kind.format} [{kind.rows}, {kind.cols}]"
                )
            continue
        held = module._parameters.get(name)
        if type(held) is not nn.Parameter:
            what = "computed" if held is None else type(held).__name__
            raise ValueError(f"{where}.{name}: expected a plain parameter, got one that is {what}")
        shape = list(held.mT.shape if layout.transposed else held.shape)
        wanted = [records.num_experts, kind.rows, kind.cols]
        if shape != wanted or held.dtype is not kind.dtype:
            raise ValueError(
                f"{where}.{name}: expected {kind.dtype} {wanted} as in the store, got {held.dtype} {shape}"
            )
        if kind.parts not in (1, layout.parts(index)):
            raise ValueError(f"{where}.{name}: expected gates and ups as in the store, got another order")
