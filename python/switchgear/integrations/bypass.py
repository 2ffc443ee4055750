# SPDX-License-Identifier: BSD-3-Clause
"""Adapters of switchgear.adapters on Hugging Face models are applied by switchgear's forwards only. So a hook of each
module refuses a call of the class's own forward."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from switchgear.weights.adapted import has_adapters


def refuse_bypass(module: nn.Module, reason: str) -> None:
    """Raises RuntimeError if the module, or a part of it, has adapters that its class's own forward would miss."""
    for part in module.modules():
        if has_adapters(part):
            _refuse(module, reason)


def _refuse(module: Any, reason: str) -> NoReturn:
    raise RuntimeError(
        f"{type(module).__name__} has adapters of switchgear.adapters, but does not run on switchgear ({reason}); "
        "call switchgear.accelerate(model), or merge(model) or remove_lora(model) of switchgear.adapters"
    )
