# SPDX-License-Identifier: BSD-3-Clause
"""Parameters [E,…] of which some rows, those of the selected experts, are trained alone.

The selected rows become a parameter <name>_selected [n,…] of their own. So gradients, the optimizer's state and its
weight decay exist for them only. The parameter [E,…] stays, frozen. Kernels read it, so the rows are copied into it
before a forward that may train, and before others if they changed: with a tenth of the experts, less than the
optimizer's own traffic of one tensor.

State dicts have the usual keys alone. Loading one sets the selected rows, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.utils.modules import is_sharded, not_compiled
from switchgear.weights.form import Layout
from switchgear.weights.state import get_state, hook_once, set_state
from switchgear.weights.weight import SelectedWeight

SUFFIX = "_selected"
_EXPERTS = "selected_experts"


class Selection:
    """The parameters of a module that are trained in part. The list of experts is its buffer selected_experts."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._seen: dict[str, tuple[Any, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self.names, "_seen": {}}  # copies have memory of their own

    def experts(self, module: nn.Module) -> Tensor:
        """[n] int32, ascending."""
        experts: Tensor = module._buffers[_EXPERTS]  # type: ignore[assignment]
        return experts

    def trained(self, module: nn.Module, name: str) -> nn.Parameter:
        parameter = module._parameters[name + SUFFIX]
        assert parameter is not None
        return parameter

    def around(self, module: nn.Module, layout: Layout, *weights: Tensor) -> tuple[Any, ...]:
        """The projections of `module` with their trained experts and biases; as they are if no gradient is needed."""
        self.update(module)
        if not torch.is_grad_enabled():
            return weights

        def selected(name: str, weight: Tensor) -> SelectedWeight:
            trained: Tensor = self.trained(module, name)
            bias = self.trained(module, f"{name}_bias") if f"{name}_bias" in self.names else None
            return SelectedWeight(weight, trained.mT if layout.transposed else trained, self.experts(module), bias)

        return tuple(selected(name, weight) for name, weight in zip(layout.names, weights, strict=True))

    def whole(self, module: nn.Module, name: str) -> Tensor:
        """The whole parameter, differentiable in its trained rows: for small ones, since it copies it."""
        self.update(module)
        parameter: Tensor = getattr(module, name)
        if not torch.is_grad_enabled():
            return parameter
        return parameter.detach().index_copy(0, self.experts(module).long(), self.trained(module, name))

    @not_compiled  # a graph cannot tell whether the rows changed
    def update(self, module: nn.Module) -> None:
        """Copies trained rows that may have changed into the parameters that kernels read. In inference, eval() without
        gradients, the versions tell. Optimizers that write `data` leave no trace in them, so training always copies."""
        if module.training or torch.is_grad_enabled():
            self.copy(module)
            return
        for name in self.names:
            whole, trained = getattr(module, name), self.trained(module, name)
            now = (_version(trained), trained.data_ptr(), _version(whole), whole.data_ptr())
            if None in now or self._seen.get(name) != now:
                self._copy(module, name)
                self._seen[name] = now

    def copy(self, module: nn.Module) -> None:
        """Copies the trained rows into the parameters that kernels read."""
        self._seen.clear()
        for name in self.names:
            self._copy(module, name)

    def _copy(self, module: nn.Module, name: str) -> None:
        # `data`: a forward whose backward is still to come has saved the whole parameter; autograd checks the version
        # of the trained one, which it saved, too.
        whole: Tensor = _whole(module, name)
        whole.data[self.experts(module).long()] = self.trained(module, name).data.to(whole.dtype)

    def reload(self, module: nn.Module) -> None:
        """Copies the rows of the whole parameters into the trained ones."""
        for name in self.names:
            with torch.no_grad():
                self.trained(module, name).copy_(_whole(module, name)[self.experts(module).long()])


def _whole(module: nn.Module, name: str) -> Tensor:
    """The parameter that kernels read. Raises ValueError if FSDP shards it: for the backward pass it gathers the
    parameter anew, without the trained rows."""
    whole: Tensor = getattr(module, name)
    if is_sharded(module, whole):
        raise ValueError(
            f"model: expected whole parameters of experts that train alone, got {name}, which FSDP shards; call "
            "finetune.unfreeze(model) before fully_shard, or use DistributedDataParallel"
        )
    return whole


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def selection_of(module: nn.Module) -> Selection | None:
    """What is trained alone in a module, or None."""
    selection: Selection | None = get_state(module).selection
    return selection


def select(module: nn.Module, names: Sequence[str], experts: Tensor) -> list[nn.Parameter]:
    """Freezes parameters of a module except the rows `experts`, which it returns as parameters. The module must call
    `Selection.update` before it reads them: `weights_of` does."""
    experts = experts.to(getattr(module, names[0]).device, torch.int32)
    made = {}
    for name in names:
        whole = getattr(module, name)
        rows = torch.empty_like(whole[: len(experts)].detach())  # in the memory order of the gradient
        made[name] = nn.Parameter(rows.copy_(whole.detach()[experts.long()]))
    for name, parameter in made.items():
        getattr(module, name).requires_grad_(False)
        module.register_parameter(name + SUFFIX, parameter)
    module.register_buffer(_EXPERTS, experts, persistent=False)
    hook_once(module, "selection", _register_hooks)
    set_state(module, selection=Selection(names))
    return list(made.values())


def unselect(module: nn.Module) -> None:
    """Undoes `select`: the parameters keep the trained rows and train as a whole."""
    selection = selection_of(module)
    assert selection is not None
    selection.copy(module)
    for name in selection.names:
        del module._parameters[name + SUFFIX]
        getattr(module, name).requires_grad_(True)
    del module._buffers[_EXPERTS]
    module._non_persistent_buffers_set.discard(_EXPERTS)
    set_state(module, selection=None)


# ---- state dicts -----------------------------------------------------------------------------------------------------


def _register_hooks(module: Any) -> None:
    module.register_state_dict_pre_hook(_before_save)
    module.register_state_dict_post_hook(_save)
    module.register_load_state_dict_pre_hook(_load)


def _before_save(module: nn.Module, *_: Any) -> None:
    if (selection := selection_of(module)) is not None:
        selection.copy(module)


def _save(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    if (selection := selection_of(module)) is not None:
        for name in selection.names:
            state_dict.pop(prefix + name + SUFFIX, None)


def _load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Adds the keys of the trained rows, from the whole parameters of the state dict or, if absent, of the module."""
    if (selection := selection_of(module)) is None:
        return
    selection.copy(module)
    experts = selection.experts(module).long()
    for name in selection.names:
        whole = state_dict.get(prefix + name)
        if not isinstance(whole, Tensor) or whole.shape != getattr(module, name).shape:  # load_state_dict reports it
            whole = getattr(module, name).detach()
        state_dict[prefix + name + SUFFIX] = whole[experts.to(whole.device)]
