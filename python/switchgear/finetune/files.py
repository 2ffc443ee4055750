# SPDX-License-Identifier: BSD-3-Clause
"""Files that hold the trained experts alone: as large as these experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from switchgear.checks import checked
from switchgear.files import AnyPath, save_whole
from switchgear.utils.packages import first_line
from switchgear.weights import Layout, layout_of
from switchgear.weights.selected import SUFFIX, selection_of

_FORMAT = 1  # version of the file format


@checked
def save_selected(model: nn.Module, path: AnyPath) -> None:
    """Writes the experts that freeze_except lets train, and the parameters that train with them, with torch.save.

    Raises ValueError if no experts are trained alone.
    """
    experts: dict[str, dict[str, Tensor]] = {}
    layouts: dict[str, dict[str, bool]] = {}
    inside: set[str] = set()
    for name, module in model.named_modules():
        if (selection := selection_of(module)) is None:
            continue
        rows = {key: selection.trained(module, key).detach().cpu().contiguous() for key in selection.names}
        experts[name] = {"experts": selection.experts(module).cpu(), **rows}
        if (layout := layout_of(module)) is not None:
            layouts[name] = _describe_layout(layout)
        inside |= {f"{name}.{key}{SUFFIX}" if name else key + SUFFIX for key in selection.names}
    if not experts:
        raise ValueError("model: expected experts that are trained alone (freeze_except), got none")
    others = {
        name: parameter.detach().cpu()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in inside
    }
    save_whole(path, {"format": _FORMAT, "experts": experts, "others": others, "layouts": layouts})


@checked
def load_selected(model: nn.Module, path: AnyPath) -> dict[str, list[int]]:
    """Writes the experts of a file of save_selected into a model, whether or not it is frozen. Other experts keep their
    values. Returns the experts by name of their module.

    Raises ValueError for any other file, or one of a model of another shape or layout (transposed, interleaved), and
    OSError for none; nothing is changed.
    """
    data = _read(path)
    targets: list[tuple[nn.Parameter, Tensor | None, Tensor]] = []  # parameter, rows or None for all, values
    for name, rows in data["experts"].items():
        module, ids = _get_module(model, name), rows["experts"]
        _check_layout(module, name, data.get("layouts", {}).get(name))
        for key, values in rows.items():
            if key != "experts":
                targets.append((_find_parameter(module, name, key, ids, values), ids.long(), values))
    parameters = dict(model.named_parameters())
    for name, values in data["others"].items():
        if name not in parameters or parameters[name].shape != values.shape:
            raise ValueError(f"path: expected parameters of this model, got {name} {list(values.shape)}")
        targets.append((parameters[name], None, values))
    chosen = [(module, selection) for module in model.modules() if (selection := selection_of(module)) is not None]
    for module, selection in chosen:
        selection.copy(module)
    with torch.no_grad():
        for parameter, index, values in targets:
            values = values.to(parameter.device, parameter.dtype)
            if index is None:
                parameter.copy_(values)
            else:
                parameter[index.to(parameter.device)] = values
    for module, selection in chosen:
        selection.reload(module)
    return {name: rows["experts"].tolist() for name, rows in data["experts"].items()}


def _get_module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"path: expected experts of this model, got those of {name}") from None


def _describe_layout(layout: Layout) -> dict[str, bool]:
    """What shapes do not tell."""
    return {"transposed": layout.transposed, "split_gates": layout.split_gates}


def _check_layout(module: nn.Module, name: str, recorded: dict[str, bool] | None) -> None:
    """Files of earlier versions, and modules that do not run on switchgear, have no layout to compare."""
    layout = layout_of(module)
    if recorded is not None and layout is not None and recorded != _describe_layout(layout):
        raise ValueError(f"path: expected experts of {name} with {_describe_layout(layout)}, got {recorded}")


def _find_parameter(module: nn.Module, name: str, key: str, ids: Tensor, values: Tensor) -> nn.Parameter:
    """The module's parameter `key`, if it has these rows."""
    parameter = module._parameters.get(key)
    if parameter is None:
        raise ValueError(f"path: expected parameters of this model, got {name}.{key}")
    if values.shape != (len(ids), *parameter.shape[1:]) or (len(ids) and int(ids.max()) >= parameter.shape[0]):
        shape, got = list(parameter.shape), list(values.shape)
        raise ValueError(f"path: expected experts of {name}.{key} {shape}, got {got} for experts {ids.tolist()}")
    return parameter


def _read(path: AnyPath) -> Any:
    with open(path, "rb") as file:
        try:
            data = torch.load(file, weights_only=True)
            if data["format"] != _FORMAT:
                raise ValueError("another format")
            for rows in data["experts"].values():
                ids = rows["experts"]
                if ids.dtype != torch.int32 or ids.dim() != 1 or (len(ids) and int(ids.min()) < 0):
                    raise ValueError("experts that are not ids")
                if not all(values.is_floating_point() for values in rows.values() if values is not ids):
                    raise ValueError("rows that are no weights")
            if not all(values.is_floating_point() for values in data["others"].values()):
                raise ValueError("parameters that are no weights")
            for layout in data.get("layouts", {}).values():
                if not all(isinstance(value, bool) for value in layout.values()):
                    raise ValueError("invalid layouts")
            return data
        except Exception as error:  # torch.load raises many kinds for files of others
            reason = first_line(error)
            raise ValueError(f"path: expected a file of save_selected, got {path} ({reason})") from error
