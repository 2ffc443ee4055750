# SPDX-License-Identifier: BSD-3-Clause
"""Whether the parameters of experts are all that they compute with, for code that reads the parameters itself."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from switchgear.weights.adapted import adapters_of, has_adapters
from switchgear.weights.module import stored_of
from switchgear.weights.selected import selection_of


def check_plain(name: str, experts: nn.Module) -> None:
    """Raises ValueError, which names the module, for weights in another form, adapters that are not merged, and experts
    that train alone."""
    for where, module in _named(name, experts):
        _check_adapters(where, module)
        if (stored := stored_of(module)) is not None:
            raise ValueError(f"{where}: expected plain weights, got {stored.form}; {stored.form.remedy}")
        if selection_of(module) is not None:
            raise ValueError(f"{where}: expected no experts that train alone; call finetune.unfreeze(model) first")


def check_replaceable(name: str, experts: nn.Module) -> None:
    """As check_plain; refuses merged adapters, too, which would belong to weights that are gone."""
    check_plain(name, experts)
    _check_merged(name, experts)


def check_state_dict(name: str, model: nn.Module) -> None:
    """As check_replaceable, for code that reads the state dict, where lossless forms are plain, and experts that
    train alone are among the others."""
    for where, module in _named(name, model):
        _check_adapters(where, module)
        stored = stored_of(module)
        if stored is not None and stored.form.suffixes:
            raise ValueError(f"{where}: expected plain weights, got {stored.form}; {stored.form.remedy}")
    _check_merged(name, model)


def _named(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, part in module.named_modules():
        yield f"{name}.{path}" if path else name, part


def _check_adapters(where: str, module: nn.Module) -> None:
    if where.rpartition(".")[2] == "base_layer":
        raise ValueError(
            f"{where}: expected a module without adapters around it; merge and unload them first, "
            "model.merge_and_unload()"
        )
    if has_adapters(module):
        raise ValueError(f"{where}: expected experts without adapters; merge them first")


def _check_merged(name: str, experts: nn.Module) -> None:
    if any(adapters_of(module) for module in experts.modules()):
        raise ValueError(
            f"{name}: expected experts without adapters, got merged ones; call merge(model, keep_adapters=False)"
        )
