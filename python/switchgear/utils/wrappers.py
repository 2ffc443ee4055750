# SPDX-License-Identifier: BSD-3-Clause
"""The model inside wrappers that forward calls to it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

# Names of the module inside wrappers of torch.compile, FSDP, and torch's for activation checkpointing
_INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside wrappers of PEFT, DistributedDataParallel, FSDP and torch.compile; itself if it has none.
    `generate` of a wrapper calls it directly, so hooks belong there."""
    while (inside := _inside(model)) is not None:
        model = inside
    return model


def without_peft(model: nn.Module) -> nn.Module:
    """The model inside a PeftModel; itself if it is none."""
    wrapper: Any = model
    return wrapper.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def plain_name(name: str) -> str:
    """The name of a module without those of wrappers of modules around it."""
    return ".".join(part for part in name.split(".") if part not in _INSIDE)


def _inside(model: nn.Module) -> nn.Module | None:
    if isinstance(model, DistributedDataParallel):
        module: nn.Module = model.module
        return module
    for name in _INSIDE:
        if name in model._modules:
            return model._modules[name]
    base = without_peft(model)
    return None if base is model else base
