# SPDX-License-Identifier: BSD-3-Clause
"""Packed checkpoints: models of transformers with stored weights, as `save_pretrained` writes and `from_pretrained`
reads them. "switchgear" is a quantisation method of transformers for them.

The quantization_config of config.json lists the stored modules, with their forms and the kinds of their weights. The
files have the tensors of these weights as the kernels read them (weights/module.py), so nothing is encoded again. They
are read into memory of their own on huge pages, where products are up to 1.5 times as fast as in mapped files.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from switchgear.integrations.checkpoint_files import Reader, read_headers
from switchgear.reference import formats
from switchgear.weights.form import FORMS, Form, Layout, embedding_layout_of, layout_of, linear_layout_of, on_huge_pages
from switchgear.weights.module import (
    Kind,
    Projection,
    StoredProjections,
    Tie,
    check_before_load,
    packed_keys,
    put,
)
from switchgear.weights.store import PLAIN_LINEARS, form_named, store
from switchgear.weights.weight import Weight

METHOD = "switchgear"


class SwitchgearConfig(QuantizationConfigMixin):
    """How a model is stored: the arguments of `switchgear.store`, for `from_pretrained` of a plain checkpoint.

        config = SwitchgearConfig("int4", linears="int8")
        model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)

    That of a packed checkpoint has `stored` instead: an entry for modules that are stored alike.
    """

    def __init__(
        self,
        form: str | Form | None = None,
        linears: str | Form | None = None,
        skip: Sequence[str] = PLAIN_LINEARS,
        stored: Sequence[dict[str, Any]] = (),
        quant_method: str = METHOD,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        if stored:
            self.stored = list(stored)
        else:
            self.form, self.linears, self.skip = form, linears, tuple(skip)


class SwitchgearQuantizer(HfQuantizer):
    """Loads packed checkpoints, and stores models that are loaded from plain ones."""

    quantization_config: Any
    accelerate: Callable[[nn.Module], Any]  # of integrations/transformers.py, which imports this module
    _loading: list[Packed]

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        if self.pre_quantized:
            if checkpoint_files is None:
                raise ValueError("quantization_config: expected none with a state_dict, got one of packed files")
            entries = getattr(self.quantization_config, "stored", ())
            self._loading = list(leave_out(model, entries, self.accelerate))
            self._files = [Path(file) for file in checkpoint_files]
            keys = {key for target in self._loading for key in target.list_keys()}
            keys |= {key.removeprefix(f"{model.base_model_prefix}.") for key in keys}
            pattern = rf"(?:^|\.)(?:{'|'.join(map(re.escape, keys))})$"
            model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), pattern}

    def postprocess_model(self, model: Any, **_: Any) -> None:
        """Puts the stored weights in place. From here on the model is one that `store` has stored, and no other: it
        can be restored, trained with adapters and saved."""
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            vars(model).pop(name, None)
        vars(model.config).pop("quantization_config", None)
        if self.pre_quantized:
            put_in(model, self._loading, self._files)
            return
        config = self.quantization_config
        if config.form is not None:
            self.accelerate(model)
        store(model, config.form, linears=config.linears, skip=config.skip, low_memory=True)

    def is_serializable(self, *_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def register(accelerate: Callable[[nn.Module], Any]) -> None:
    """Makes the method known to transformers. Idempotent."""
    SwitchgearQuantizer.accelerate = staticmethod(accelerate)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(SwitchgearQuantizer)
        auto.register_quantization_config(METHOD)(SwitchgearConfig)


# ---- config ----------------------------------------------------------------------------------------------------------


def is_packable(stored: StoredProjections) -> bool:
    """Whether a packed checkpoint can have these projections: their form is one of weights in memory."""
    return FORMS.get(stored.form.name) is type(stored.form) and stored.is_in_memory


class _Entry(NamedTuple):
    """What modules that are stored alike share."""

    form: Form
    kinds: tuple[Kind, ...]


def config_of(stored: Iterable[tuple[str, StoredProjections]]) -> SwitchgearConfig:
    """The config of modules, by path."""
    entries: dict[str, dict[str, Any]] = {}
    for path, one in stored:
        form = {"name": one.form.name, **dataclasses.asdict(one.form)}
        alike = {"form": form, "weights": [_write_kind(projection.kind) for projection in one.projections]}
        entries.setdefault(json.dumps(alike), {**alike, "modules": []})["modules"].append(path)
    return SwitchgearConfig(stored=list(entries.values()))


def _write_kind(kind: Kind) -> dict[str, Any]:
    names = {
        name: str(dtype).removeprefix("torch.") for name in ("dtype", "elements") if (dtype := getattr(kind, name))
    }
    return {**kind._asdict(), "elements": None, **names, "fields": list(kind.fields)}


def _read_kind(entry: dict[str, Any]) -> Kind:
    found = dict(entry)
    for name in ("dtype", "elements"):
        if found[name] is not None and not isinstance(dtype := getattr(torch, found[name]), torch.dtype):
            raise TypeError(f"{name}: expected a dtype of torch, got {dtype}")
        found[name] = None if found[name] is None else getattr(torch, found[name])
    return Kind(**{**found, "fields": tuple(found["fields"])})


def _read_entry(entry: Any) -> tuple[_Entry, list[str]]:
    try:
        form = dict(entry["form"])
        kinds = tuple(_read_kind(kind) for kind in entry["weights"])
        return _Entry(form_named(form.pop("name"), form), kinds), list(entry["modules"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"quantization_config: expected one of switchgear {METHOD}, got {error}") from error


# ---- into a model ----------------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """A module of a model on meta whose weights a packed checkpoint has."""

    path: str  # in the checkpoint
    module: nn.Module
    entry: _Entry
    layout: Layout
    sizes: list[torch.Size]  # [E,N,C] of its projections
    trained: list[bool]

    def list_keys(self) -> Iterator[str]:
        for name, kind in zip(self.layout.names, self.entry.kinds, strict=True):
            yield from (key for _, key in packed_keys(f"{self.path}.{name}", kind))


def leave_out(model: Any, entries: Sequence[Any], accelerate: Callable[[nn.Module], Any]) -> Iterator[Packed]:
    """Takes the parameters of stored projections out of a model on meta, whose experts run on switchgear then. Raises
    ValueError for a module that cannot be stored."""
    modules = dict(model.named_modules())
    found = [(entry, path) for each in entries for entry, paths in [_read_entry(each)] for path in paths]
    places = {path: _find(modules, path, model.base_model_prefix) for _, path in found}
    if any(linear_layout_of(module) is None for module in places.values() if module is not None):
        accelerate(model)
    for entry, path in found:
        if (module := places[path]) is None:
            continue  # a head that this class of the model does not have
        layout = linear_layout_of(module) or embedding_layout_of(module) or layout_of(module)
        if layout is None or len(layout.names) != len(entry.kinds):
            raise ValueError(f"{path}: expected a module that can be stored, got {type(module).__name__}")
        parameters = [module._parameters[name] for name in layout.names]
        sizes = [layout.view(parameter).shape for parameter in parameters]  # type: ignore[arg-type]
        yield Packed(path, module, entry, layout, sizes, [p.requires_grad for p in parameters])  # type: ignore[union-attr]
        for name in layout.names:
            module.register_parameter(name, None)
        module._is_hf_initialized = True  # type: ignore[assignment]


def _find(modules: dict[str, nn.Module], path: str, prefix: str) -> nn.Module | None:
    """The module at a path, whether the model, or the one that was saved, is the other's base."""
    names = (path, path.removeprefix(f"{prefix}."), f"{prefix}.{path}")
    return next((modules[name] for name in names if name in modules), None)


@torch.inference_mode(False)  # a backward pass may save the weights
def put_in(model: nn.Module, targets: Sequence[Packed], files: Sequence[Path]) -> None:
    """Reads the weights of packed files and puts them in place of the parameters that `leave_out` took out."""
    headers = {key: header for file in files for key, header in read_headers(file).items()}
    reader = Reader(headers)
    for path, module, entry, layout, sizes, trained in targets:
        device = next((t.device for t in (*module.parameters(), *module.buffers())), model.device)
        weights = []
        for index, (name, kind) in enumerate(zip(layout.names, entry.kinds, strict=True)):
            tensors = {}
            for field, key in packed_keys(f"{path}.{name}", kind):
                if key not in headers:
                    raise ValueError(f"{key}: expected a tensor in the files of the checkpoint, got none")
                tensors[field] = on_huge_pages(reader.tensor(key)).to(device)  # type: ignore[arg-type]
            weight = kind.weight(tensors)
            experts, rows, cols = sizes[index]
            formats.check_weight(f"{path}.{name}", weight.tensors, weight.form, (experts, rows, cols), weight.dtype)
            weights.append(_in_own_order(f"{path}.{name}", weight, entry.form, layout.parts(index)))
        kinds = zip(weights, trained, strict=True)
        projections = tuple(Projection(Kind.of(weight), was_trained, Tie()) for weight, was_trained in kinds)
        put(module, StoredProjections(entry.form, layout, projections), tuple(weights))
    check_before_load(model)


def _in_own_order(name: str, weight: Weight, form: Form, parts: int) -> Weight:
    """Panels in the order of this processor, if another has written them."""
    if weight.format != "panels" or not weight.data.is_cpu or weight.multiplies(weight.dtype):
        return weight
    made = form.encode(name, weight.plain(), parts)
    return weight if isinstance(made, str) else made
