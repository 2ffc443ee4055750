# SPDX-License-Identifier: BSD-3-Clause
"""Papers as options: each function returns a dict for MoE; most work for Router too.

    moe = switchgear.MoE(2048, 1024, 64, **switchgear.presets.expert_choice())

A preset that composes several layers names their builder under "layer"; `build` takes any of the dicts:

    layer = switchgear.presets.build(2048, 1024, 64, **switchgear.presets.multi_head())

Callers may override what a preset sets: `{**presets.switch(), "jitter": 0.0}`. Parts with parameters or state are
functools.partial objects, so one dict serves any number of layers. docs/presets.md is their table. Constants that could
not be confirmed in the paper are arguments; docstrings end with a list of them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from switchgear.modules import MoE
from switchgear.presets.entry import PRESETS

if TYPE_CHECKING:
    from switchgear.presets.adapters import *  # noqa: F403
    from switchgear.presets.balance import *  # noqa: F403
    from switchgear.presets.compositions import *  # noqa: F403
    from switchgear.presets.experts import *  # noqa: F403
    from switchgear.presets.models import *  # noqa: F403
    from switchgear.presets.scores import *  # noqa: F403
    from switchgear.presets.selections import *  # noqa: F403


def build(
    hidden_size: int, intermediate_size: int, num_experts: int, *, layer: Callable[..., nn.Module] = MoE, **options: Any
) -> nn.Module:
    """Builds the layer of a preset: layer(hidden_size, intermediate_size, num_experts, **options)."""
    return layer(hidden_size, intermediate_size, num_experts, **options)


if not TYPE_CHECKING:
    for _module in pkgutil.iter_modules(__path__):  # noqa: F405  each enters its presets
        importlib.import_module(f"{__name__}.{_module.name}")
    globals().update({name: entry.function for name, entry in PRESETS.items()})
    __all__ = sorted(["build", *PRESETS])
