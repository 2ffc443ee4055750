# SPDX-License-Identifier: BSD-3-Clause
"""The modules whose experts a store has, and what offloading changes in one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from switchgear.checks import as_device
from switchgear.offload.pool import arena
from switchgear.offload.projections import OffloadedForm, OffloadedProjections
from switchgear.offload.store import Store
from switchgear.offload.store_records import Records, StoreError
from switchgear.weights.form import Layout, hint_for, layout_of
from switchgear.weights.module import Kind, Projection, StoredProjections, Tie, in_layout, put, stored_of
from switchgear.weights.selected import selection_of
from switchgear.weights.state import set_state
from switchgear.weights.store import wrapper_of
from switchgear.weights.weight import Weight

# ---- Modules ---------------------------------------------------------------------------------------------------------


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


def find_targets(model: nn.Module, store: Store) -> list[Target]:
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
            some = ", ".join([*list(store.layers)[:2], *["…"] * (len(store.layers) > 2)])
            raise ValueError(f"{where}: expected a store with its experts, got one of {some} in {store.path}")
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


def choose_device(model: nn.Module, targets: list[Target], wanted: torch.device | str | None) -> torch.device:
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


# ---- The change of a module ------------------------------------------------------------------------------------------


Read = tuple[int, int, int, int | None]  # file, offset, bytes and checksum of a record


@dataclass
class Attachment:
    """reads: of each expert. original: how the module stored its experts; None: as parameters. had_weights: whether
    it had their numbers, and place where. held: its parameters or stored weights, until all modules are changed."""

    target: Target
    reads: Sequence[Read]
    stored: OffloadedProjections
    original: StoredProjections | None
    had_weights: bool
    held: Sequence[Any]
    place: torch.device

    @staticmethod
    def of(
        target: Target, form: OffloadedForm, weights: tuple[Any, Any], reads: Sequence[Read], ties: dict[int, Tie]
    ) -> Attachment:
        module, layout, original = target.module, target.layout, target.stored
        held: Sequence[Any] = ()
        if isinstance(original, OffloadedProjections):  # closed
            had_weights, original = False, None
        elif original is not None:
            had_weights, held = True, original.weights(module)
        else:
            held = [module._parameters[name] for name in layout.names]
            had_weights = not any(parameter.is_meta for parameter in held)
        projections = []
        for index, kind in enumerate(target.records.kinds):
            if target.stored is not None:
                before = target.stored.projections[index]
                projections.append(Projection(kind, before.trained, before.tie))
            else:
                tie = ties.setdefault(id(held[index]), Tie())
                projections.append(Projection(kind, held[index].requires_grad, tie))
        stored = OffloadedProjections(form, layout, (projections[0], projections[1]), weights, target.records)
        place = held[0].device if had_weights else torch.device("cpu")
        return Attachment(target, reads, stored, original, had_weights, held, place)

    def commit(self) -> None:
        if self.original is not None:
            self.original.take_out_of(self.target.module)
        put(self.target.module, self.stored, ())

    def undo(self) -> None:
        module, names = self.target.module, self.target.layout.names
        if self.original is not None:
            self.original.put_into(module, (self.held[0], self.held[1]))
        elif self.target.stored is None:
            for name, parameter in zip(names, self.held, strict=True):
                vars(module).pop(name, None)
                module.register_parameter(name, parameter)
        set_state(module, stored=self.target.stored)

    def forget(self) -> None:
        """Frees what the module had."""
        self.held = ()

    def end(self, weights: tuple[Weight, Weight] | None, ties: dict[Tie, nn.Parameter]) -> None:
        """Restores `weights`; None: a call of the module raises an error from now on."""
        module, layout = self.target.module, self.target.layout
        self.stored.close()
        if weights is None:
            return
        stored: StoredProjections | None = None
        if self.original is not None:
            own = (_contiguous(weights[0], self.place), _contiguous(weights[1], self.place))
            first, second = (
                Projection(Kind.of(weight), projection.trained, projection.tie)
                for weight, projection in zip(own, self.stored.projections, strict=True)
            )
            stored = StoredProjections(self.original.form, layout, (first, second))
            stored.put_into(module, own)
        else:
            for name, weight, projection in zip(layout.names, weights, self.stored.projections, strict=True):
                if projection.tie not in ties:
                    plain = in_layout(weight.plain(), layout)
                    if plain.untyped_storage().nbytes() > plain.nbytes or not plain.is_contiguous():
                        plain = plain.clone()  # not a view of records
                    ties[projection.tie] = nn.Parameter(plain.to(self.place), requires_grad=projection.trained)
                vars(module).pop(name, None)
                module.register_parameter(name, ties[projection.tie])
        set_state(module, stored=stored)


def _contiguous(weight: Weight, place: torch.device) -> Weight:
    """Without the rest of the records, on the device where it was."""
    fields = ("data", "scales", "row_scales", "zeros")
    found = {field: getattr(weight, field) for field in fields}
    made: dict[str, Any] = {field: tensor.contiguous() for field, tensor in found.items() if tensor is not None}
    if weight.records is not None:  # the planes of an expert are consecutive, and may be more than one
        data, planes, ranges, count = weight.data, [], [], 0
        for first, bits in weight.records.tolist():
            size = data[0].numel()
            strides = (size, *data.stride()[1:])
            begin = data.storage_offset() + first * data.stride(0)
            planes.append(data.as_strided((bits, *data.shape[1:]), strides, begin))
            ranges.append((count, bits))
            count += bits
        made |= {"data": torch.cat(planes), "records": torch.tensor(ranges, dtype=torch.int32)}
    return weight.with_tensors({field: tensor.to(place) for field, tensor in made.items()})


@torch.inference_mode(False)  # a backward pass may save the weights
def read_all(
    reader: Any, records: Records, reads: Sequence[Read], timeout: float, place: torch.device | None = None
) -> tuple[Weight, Weight]:
    """The two weights of a layer with all experts, in memory of their own, by default the host's."""
    memory = arena(records.num_experts, records.record_bytes)
    begin = memory.data_ptr()
    tickets: list[int] = []
    try:
        for expert, read in enumerate(reads):
            tickets.append(reader.submit(read, begin + expert * records.record_bytes))
        for expert, ticket in enumerate(tickets):
            try:
                reader.wait(ticket, timeout)
            except OSError as error:
                raise StoreError(f"{records.name}, expert {expert}: {error}") from error
    except BaseException:
        for ticket in tickets:
            end_read(reader, ticket)
        raise
    first, second = records.weights(memory if place is None else memory.to(place), None)
    return first, second


def end_read(reader: Any, ticket: int) -> None:
    """Nothing writes into the memory of this read any more."""
    try:
        if not reader.cancel(ticket):
            reader.wait(ticket, 1e9)
    except (OSError, ValueError):
        pass
