# SPDX-License-Identifier: BSD-3-Clause
"""Adapters of switchgear.adapters and experts that train alone are known to switchgear's forwards only. So each
such module of a Hugging Face model has a hook that refuses a call of its class's own forward."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from switchgear.weights.adapted import has_adapters
from switchgear.weights.selected import selection_of


def refuse_bypass(module: nn.Module, reason: str) -> None:
    """Raises RuntimeError if the module, or a part of it, has adapters or experts that train alone, which its class's
    own forward would miss."""
    for part in module.modules():
        if has_adapters(part):
            _refuse(
                module, reason, "adapters of switchgear.adapters",
                "merge(model) or remove_lora(model) of switchgear.adapters",
            )  # fmt: skip
        if selection_of(part) is not None:
            _refuse(module, reason, "experts that train alone", "switchgear.finetune.unfreeze(model)")


def _refuse(module: Any, reason: str, what: str, remedy: str) -> NoReturn:
    raise RuntimeError(
        f"{type(module).__name__} has {what}, but does not run on switchgear ({reason}); "
        f"call switchgear.accelerate(model), or {remedy}"
    )
