# SPDX-License-Identifier: BSD-3-Clause
"""A published model at its true size with generated weights: a store of its experts, and the rest in memory.

Experts are windows of a few encoded ones: bytes that differ from record to record, made without arithmetic. A layer is
in memory at a time, and nothing is on the disk twice.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import switchgear
from switchgear import offload
from switchgear.cli.common import CommandError, require
from switchgear.offload.store import write_from
from switchgear.offload.store_records import lay_out_records
from switchgear.offload.store_sources import Layer, Source
from switchgear.weights import Weight, encode, layout_of
from switchgear.weights.form import linear_layout_of
from switchgear.weights.store import PLAIN_LINEARS

FORMS = ("mxfp4", "int4", "int8")  # whose data can be cut anywhere
KEEP = 15 << 30  # bytes of the disk that stay free
ENCODED = 2  # experts


def build_on_meta(config: Any) -> Any:
    """The model, whose experts run on switchgear, without numbers."""
    transformers = require("transformers")
    transformers.logging.set_verbosity_error()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    switchgear.accelerate(model)
    return model.eval()


# ---- experts ---------------------------------------------------------------------------------------------------------


def fit_layers(config: Any, form: str, folder: Path) -> Any:
    """The config, or one with as many layers as the disk has room for."""
    generated = sources(build_on_meta(config), form).layers
    layers = config.num_hidden_layers
    others = layers - len(generated)  # without experts
    room = max(shutil.disk_usage(folder).free - KEEP, 0) // layer_bytes(generated[0])
    return config if room >= len(generated) else with_layers(config, others + room)


def with_layers(config: Any, count: int) -> Any:
    """The config with fewer layers."""
    if count < 1:
        raise CommandError("--checkpoint: expected a disk with room for a layer of the model")
    entries = copy.deepcopy(config.to_dict())
    entries["num_hidden_layers"] = count
    for name in ("layer_types", "mlp_layer_types"):
        if entries.get(name):
            entries[name] = entries[name][:count]
    return type(config).from_dict(entries)


def layer_bytes(layer: Layer) -> int:
    return lay_out_records(layer.name, "", layer.weights()).nbytes


def sources(model: Any, form: str) -> Source:
    """Generated experts of all layers of a model on meta."""
    layers: list[Layer] = []
    for name, module in model.named_modules():
        if (layout := layout_of(module)) is not None:
            first, second = (layout.view(getattr(module, one)).shape for one in layout.names)
            parts = layout.parts(0), layout.parts(1)
            weights = partial(_windows_of_both, tuple(first), tuple(second), parts, form, len(layers))
            layers.append(Layer(name, (*first, *second[1:]), weights, lambda: "generated"))
    return Source(layers, lambda: None)


def write_experts(
    config: Any, form: str, path: Path, progress: Callable[[int, int, str], None] = lambda done, total, name: None
) -> offload.Store:
    """Writes the store, or opens the one that is there."""
    if not path.exists():
        write_from(sources(build_on_meta(config), form), path, form, progress, resume=True)
    return offload.Store.open(path)


def _windows_of_both(
    first: tuple[int, ...], second: tuple[int, ...], parts: tuple[int, int], form: str, layer: int
) -> tuple[Weight, Weight]:
    return _windows(first, parts[0], form, layer), _windows(second, parts[1], form, layer)


def _windows(shape: tuple[int, ...], parts: int, form: str, layer: int) -> Weight:
    """[E,N,C]: expert e has the codes that begin at e·step of the encoded ones, and the scales of the first."""
    few = _encoded(shape[1:], parts, form)
    one, number = few.data[0], shape[0]
    step = one.numel() * (ENCODED - 1) // (number + 1)
    data = few.data.as_strided((number, *one.shape), (step, *one.stride()), layer % max(step, 1))
    fields = ("scales", "row_scales", "zeros")
    rest = {name: t[:1].expand(number, *t.shape[1:]) for name in fields if (t := getattr(few, name)) is not None}
    return few.with_tensors({"data": data, **rest})


@cache
def _encoded(shape: tuple[int, ...], parts: int, form: str) -> Weight:
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(ENCODED, *shape, dtype=torch.bfloat16).normal_(0, shape[1] ** -0.5, generator=generator)
    return encode(weight, form, parts=parts)


# ---- the rest --------------------------------------------------------------------------------------------------------


def fill(model: Any, linears: str) -> Any:
    """Gives numbers to all but the experts, module by module; linear layers are stored at once."""
    from switchgear.integrations.published import compute_buffers

    compute_buffers(model, torch.device("cpu"))
    plain = tuple(name for name in PLAIN_LINEARS if name != "lm_head")
    experts = {
        id(getattr(m, name)) for m in model.modules() if (found := layout_of(m)) is not None for name in found.names
    }
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and id(parameter) not in experts:
                numbers = _numbers(name, parameter)
                module._parameters[name] = nn.Parameter(numbers, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
        last = path.rpartition(".")[2]
        if linear_layout_of(module) is not None and not any(fnmatchcase(last, one) for one in plain):
            switchgear.store(nn.ModuleList([module]), None, linears=linears, skip=())
    return model


def _numbers(name: str, like: Tensor) -> Tensor:
    """Matrices keep the size of what they multiply; norms are ones, and biases zeros."""
    if like.dim() > 1 and not name.endswith("bias"):
        pool = _pool().mul(like.shape[-1] ** -0.5).to(like.dtype)
        return pool.repeat(-(-like.numel() // len(pool)))[: like.numel()].view(like.shape)
    return torch.full_like(like, float(name == "weight"), device="cpu")


@cache
def _pool() -> Tensor:
    """Random numbers, fewer than a matrix has: drawing all would take most of the time."""
    return torch.randn((1 << 20) + 1, generator=torch.Generator().manual_seed(0))
