# SPDX-License-Identifier: BSD-3-Clause
"""Whether the parameters of experts are all that they compute with, for code that reads the parameters itself."""

from __future__ import annotations

from torch import nn

from switchgear.weights.adapted import adapters_of, has_adapters
from switchgear.weights.module import stored_of
from switchgear.weights.selected import selection_of


def check_plain(name: str, experts: nn.Module) -> None:
    """Raises ValueError, which names the module, for weights in another form, adapters that are not merged, and experts
    that train alone."""
    for path, module in experts.named_modules():
        where = f"{name}.{path}" if path else name
        if path.rpartition(".")[2] == "base_layer":
            raise ValueError(
                f"{where}: expected a module without adapters around it; merge and unload them first, "
                "model.merge_and_unload()"
            )
        if (stored := stored_of(module)) is not None:
            raise ValueError(f"{where}: expected plain weights, got {stored.form}; restore(model) first")
        if has_adapters(module):
            raise ValueError(f"{where}: expected experts without adapters; merge them first")
        if selection_of(module) is not None:
            raise ValueError(f"{where}: expected no experts that train alone; call finetune.unfreeze(model) first")


def check_replaceable(name: str, experts: nn.Module) -> None:
    """As check_plain; refuses merged adapters, too, which would belong to weights that are gone."""
    check_plain(name, experts)
    if any(adapters_of(module) for module in experts.modules()):
        raise ValueError(
            f"{name}: expected experts without adapters, got merged ones; call merge(model, keep_adapters=False)"
        )
