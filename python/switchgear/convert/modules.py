# SPDX-License-Identifier: BSD-3-Clause
"""The dense feed-forward modules of a model, and their replacement: all or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from switchgear.convert.ffn import feed_forward, is_feed_forward
from switchgear.convert.result import Conversion, Converted


def replaced(model: nn.Module, layers: str | Sequence[int], make: Any) -> Conversion:
    """The model with its dense feed-forward modules `layers` replaced by make(weights, index): all or none."""
    found = [(name, module) for name, module in model.named_modules() if name and is_feed_forward(module)]
    if not found:
        raise ValueError(f"model: expected dense feed-forward modules in {type(model).__name__}, found none")
    chosen = chosen_layers(layers, len(found))
    done, modules = [], []
    for index in chosen:
        name, module = found[index]
        made = make(feed_forward(module, name), index)
        modules.append((name, made.train(module.training)))
        done.append(Converted(name, type(module).__name__, made.experts.num_experts, made.extra_repr() or "MoE"))
    for name, made in modules:  # all are made
        model.set_submodule(name, made)
    return Conversion(model, tuple(done))


def chosen_layers(layers: str | Sequence[int], count: int) -> list[int]:
    """Ascending indices below `count`. Raises ValueError for others."""
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f"layers: expected 'all' or indices, got {layers!r}")
        return list(range(count))
    wanted = list(layers)
    if not wanted or not all(isinstance(index, int) and -count <= index < count for index in wanted):
        raise ValueError(f"layers: expected indices of {count} feed-forward layers, got {wanted}")
    return sorted({index % count for index in wanted})


def is_transformers(model: nn.Module) -> bool:
    """Whether a module is a model of transformers, which is not imported for it."""
    classes = (cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers."))
    return any(cls.__name__ == "PreTrainedModel" for cls in classes)
