# SPDX-License-Identifier: BSD-3-Clause
"""What a store is written from: the experts of a model in memory, or of a checkpoint, one layer at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchgear import _C
from switchgear.offload.projections import OffloadedForm
from switchgear.weights.form import FORMS, Form, Layout, hint_for, layout_of
from switchgear.weights.module import StoredProjections, stored_of
from switchgear.weights.selected import selection_of
from switchgear.weights.weight import Weight

AS_PUBLISHED = "as published"


class Layer(NamedTuple):
    """The experts of a module.

    weights: reads and encodes them. fingerprint: changes when the numbers that they are made from do.
    """

    name: str
    sizes: tuple[int, ...]  # E, and rows and columns of both projections
    weights: Callable[[], tuple[Weight, Weight]]
    fingerprint: Callable[[], str]


@dataclass(frozen=True)
class Source:
    """dtype: in which a checkpoint is read; None for a model, whose numbers have one."""

    layers: list[Layer]
    close: Callable[[], None]
    dtype: torch.dtype | None = None


# ---- a model in memory -----------------------------------------------------------------------------------------------


def of_model(model: nn.Module, form: Form | None) -> Source:
    """The experts of a model. form: None keeps that in which they are. Raises ValueError for a module whose experts
    cannot be stored, before anything is read."""
    layers = []
    for name, module in model.named_modules():
        where = f"source.{name}" if name else "source"
        _refuse(module, where)
        stored, layout = stored_of(module), layout_of(module)
        if stored is not None and stored.layout.stored_class is None:  # experts
            if isinstance(stored.form, OffloadedForm):
                raise ValueError(f"{where}: expected experts in memory, got {stored.form}; {stored.form.remedy}")
            if form is not None and stored.form != form:
                raise ValueError(
                    f"{where}: expected plain weights, got {stored.form}; pass form={AS_PUBLISHED!r} or call "
                    "switchgear.restore(source) first"
                )
            first, second = stored.weights(module)
            if type(first) is not Weight or type(second) is not Weight:
                raise ValueError(f"{where}: expected experts in memory, got {stored.form}")
            sizes = (*first.shape, *second.shape[1:])
            layers.append(Layer(name, sizes, partial(_read_both, stored, module), partial(_sum_up, module)))
        elif layout is not None:
            _check_plain(module, layout, where)
            shapes = [_rows_first(getattr(module, key), layout).shape for key in layout.names]
            sizes = (*shapes[0], *shapes[1][1:])
            encode = partial(_encode_both, module, layout, form, where)
            layers.append(Layer(name, sizes, encode, partial(_sum_up, module)))
    if not layers:
        raise ValueError(
            f"source: expected a model with experts on the fused kernel, {type(model).__name__} has none "
            f"({hint_for(model)})"
        )
    return Source(layers, lambda: None)


def _refuse(module: nn.Module, where: str) -> None:
    """Experts of which this process has a part."""
    from switchgear.parallel.experts import ParallelExperts  # imports torch.distributed

    if isinstance(module, ParallelExperts):
        raise ValueError(
            f"{where}: expected all experts of a layer in this process, got ParallelExperts; write the store from the "
            "checkpoint or from a model without parallel="
        )


def _check_plain(module: nn.Module, layout: Layout, where: str) -> None:
    if selection_of(module) is not None:
        raise ValueError(f"{where}: expected no experts that train alone: call switchgear.finetune.unfreeze(source)")
    for name in layout.names:
        parameter = module._parameters.get(name)
        if type(parameter) is not nn.Parameter:
            got = "computed" if parameter is None else f"a {type(parameter).__name__}"
            raise ValueError(f"{where}.{name}: expected a plain parameter, got one that is {got}")
        if parameter.is_meta:
            raise ValueError(f"{where}.{name}: expected numbers, got a parameter on meta; write from the checkpoint")


def _rows_first(weight: Tensor, layout: Layout) -> Tensor:
    return weight.mT if layout.transposed else weight


def _read_both(stored: StoredProjections, module: nn.Module) -> tuple[Weight, Weight]:
    first, second = stored.weights(module)
    return first, second


def _encode_both(module: nn.Module, layout: Layout, form: Form | None, where: str) -> tuple[Weight, Weight]:
    first, second = (
        encoded(f"{where}.{name}", _rows_first(getattr(module, name).detach(), layout).cpu(), layout.parts(index), form)
        for index, name in enumerate(layout.names)
    )
    return first, second


def encoded(name: str, weight: Tensor, parts: int, form: Form | None) -> Weight:
    """A weight [E,N,C] in a form; None: as it is."""
    if form is None:
        _, rows, cols = weight.shape
        return Weight("plain", weight, rows, cols, weight.dtype, is_exact=True)
    made = form.encode(name, weight, parts)
    if isinstance(made, str):
        raise ValueError(f"source: expected experts that can be stored as {form}; {made}")
    return made


def _sum_up(module: nn.Module) -> str:
    """A digest of the projections: numbers that changed since an interrupted run are written again."""
    stored, layout = stored_of(module), layout_of(module)
    if stored is not None:
        return _digest(stored.weights(module))
    return _digest([] if layout is None else [getattr(module, name).detach() for name in layout.names])


def _digest(weights: Sequence[Tensor | Weight]) -> str:
    tensors = [t for weight in weights for t in (weight.tensors if isinstance(weight, Weight) else (weight,))]
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.cpu().contiguous()
        digest.update(_C.checksum(flat.data_ptr(), flat.nbytes).to_bytes(8, "little"))
        digest.update(str((flat.shape, flat.dtype)).encode())
    return digest.hexdigest()


# ---- a checkpoint ----------------------------------------------------------------------------------------------------


def of_checkpoint(path: Path, form: Form | None, dtype: torch.dtype | None) -> Source:
    """The experts of a checkpoint of a model of transformers. The model is made on meta, to map keys; layers are read
    one at a time. form: None keeps what is published, quantized or not."""
    from switchgear.integrations.checkpoint_files import Reader  # imports transformers
    from switchgear.integrations.published import planned

    plan = planned(path, dtype)
    reader = Reader(plan.files.headers)
    files = sorted({header.file for header in plan.files.headers.values()})
    identity = str([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    device = torch.device("cpu")

    def read_both(name: str, layout: Layout) -> tuple[Weight, Weight]:
        made = []
        for index, projection in enumerate(layout.names):
            target = f"{name}.{projection}"
            found: Any = plan.reads[target](reader, device)
            made.append(_in_form(target, found, plan.forms.get(target), layout, index, form))
        return made[0], made[1]

    layers = [
        Layer(name, sizes, partial(read_both, name, layout), lambda: identity) for name, layout, sizes in plan.experts()
    ]
    if not layers:
        raise ValueError(f"source: expected a checkpoint with experts on the fused kernel, {path} has none")
    return Source(layers, reader.close, plan.model.dtype)


def _in_form(
    name: str, found: Tensor | Weight, own: Form | None, layout: Layout, index: int, form: Form | None
) -> Weight:
    """A projection of a checkpoint in a form; None, or its `own`: as it is."""
    if not isinstance(found, Weight):
        return encoded(name, _rows_first(found, layout), layout.parts(index), form)
    return found if form in (None, own) else encoded(name, found.plain(), layout.parts(index), form)


def of_gguf(path: Path, form: Form | None, dtype: torch.dtype | None) -> Source:
    """The experts of a GGUF file, which stay there until their layer is written. form: None keeps the blocks."""
    from switchgear.integrations.gguf import FileExperts, load_without_experts  # imports transformers

    model, experts = load_without_experts(path, dtype or torch.float32)

    def read_both(own: FileExperts) -> tuple[Weight, Weight]:
        made = []
        for index, (projection, found) in enumerate(zip(own.layout.names, own.read(), strict=True)):
            kept = FORMS[found.format]() if isinstance(found, Weight) else None
            made.append(_in_form(f"{own.path}.{projection}", found, kept, own.layout, index, form))
        return made[0], made[1]

    def sum_up(number: int) -> str:
        if number:
            experts[number - 1].release()  # has been written
        return _digest(experts[number].read())

    layers = []
    for number, own in enumerate(experts):
        if layout_of(own.module) is None:
            raise ValueError(f"source: expected experts on the fused kernel, got {type(own.module).__name__} in {path}")
        shapes = [own.layout.view(own.module.get_parameter(name)).shape for name in own.layout.names]
        sizes = (*shapes[0], *shapes[1][1:])
        layers.append(Layer(own.path, sizes, partial(read_both, own), partial(sum_up, number)))
    return Source(layers, lambda: None, model.dtype)
