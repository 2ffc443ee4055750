# SPDX-License-Identifier: BSD-3-Clause
"""Helpers for modules: float32 buffers, parameters that were scalars or may be sharded, eval(), models in wrappers;
functions that torch.compile leaves out of its graphs, and functions of other libraries that are extended in place."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

P = ParamSpec("P")
R = TypeVar("R")

# ---- buffers ---------------------------------------------------------------------------------------------------------


_META = torch.device("meta")


class KeepsFloat32(nn.Module):
    """A module whose own float32 buffers keep their dtype and values in .half(), .double(), .to(dtype) and the like,
    and their dtype in load_state_dict(assign=True).

    16 bits would round away the small steps of a sum. Other conversions, as of devices, are as usual.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self._float32_buffers()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype is not torch.float32:
                self._buffers[name] = buffer.to(after.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        before = self._float32_buffers()
        super()._load_from_state_dict(*args, **kwargs)
        for name in before:
            self._buffers[name] = self._buffers[name].float()  # type: ignore[union-attr]

    def _float32_buffers(self) -> dict[str, Tensor]:
        return {name: b for name, b in self._buffers.items() if b is not None and b.dtype is torch.float32}


class FillsBuffers(nn.Module):
    """A module that knows the values of its buffers outside of the state dict: `fill_buffers`.

    A model that is made on the meta device gets its memory without them. to_empty fills them here;
    load_state_dict(assign=True) leaves them on meta, where `fill_on` finds them before their first use.
    """

    def fill_buffers(self, device: torch.device) -> None:
        """Makes these buffers anew."""
        raise NotImplementedError

    def fill_on(self, device: torch.device) -> None:
        """Makes them anew if they have no values and `device` has some."""
        if device.type != "meta" and _META in self._places():
            self.fill_buffers(device)

    def _places(self) -> list[torch.device]:
        buffers = [self._buffers[name] for name in self._non_persistent_buffers_set]
        return [buffer.device for buffer in buffers if buffer is not None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        were_empty = _META in self._places()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if were_empty and _META not in (places := self._places()):
            self.fill_buffers(places[0])
        return self


# ---- parameters ------------------------------------------------------------------------------------------------------


class LoadsScalars(nn.Module):
    """Loads state dicts that have a scalar for one of `once_scalars`, too."""

    once_scalars: tuple[str, ...] = ()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.once_scalars:
            value = state_dict.get(f"{prefix}{name}")
            if value is not None and value.dim() == 0:
                state_dict[f"{prefix}{name}"] = value.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


def is_sharded(module: nn.Module, parameter: Tensor | None) -> bool:
    """Whether FSDP2 shards a parameter of a module. During a forward it is plain, so hooks of the module tell."""
    hooks = module._state_dict_pre_hooks.values()
    return hasattr(parameter, "device_mesh") or any("fsdp" in (getattr(h, "__module__", None) or "") for h in hooks)


def replicate(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has, for operations with `like`."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    whole: Tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole


# ---- models ----------------------------------------------------------------------------------------------------------


@contextmanager
def set_eval(model: nn.Module) -> Iterator[None]:
    """Inside the block, a model is in eval()."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


# Names of the module inside wrappers of torch.compile, FSDP, and torch's for activation checkpointing
_INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def get_inner_model(model: nn.Module) -> nn.Module:
    """The model inside wrappers of PEFT, DistributedDataParallel, FSDP and torch.compile; itself if it has none.
    `generate` of a wrapper calls it directly, so hooks belong there."""
    while (inside := _get_inside(model)) is not None:
        model = inside
    return model


def unwrap_peft(model: nn.Module) -> nn.Module:
    """The model inside a PeftModel; itself if it is none."""
    wrapper: Any = model
    return wrapper.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def strip_wrapper_names(name: str) -> str:
    """The name of a module without those of wrappers of modules around it."""
    return ".".join(part for part in name.split(".") if part not in _INSIDE)


def _get_inside(model: nn.Module) -> nn.Module | None:
    if isinstance(model, DistributedDataParallel):
        module: nn.Module = model.module
        return module
    for name in _INSIDE:
        if name in model._modules:
            return model._modules[name]
    base = unwrap_peft(model)
    return None if base is model else base


# ---- functions -------------------------------------------------------------------------------------------------------
# torch.compiler's decorators import torch's compiler, which takes longer than the import of torch. With these, it is
# imported by whoever compiles.


def not_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """As torch.compiler.disable."""
    disabled: Callable[P, R] | None = None

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:  # so nothing is being compiled
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return disabled(*args, **kwargs)

    wrapper._torchdynamo_disable = True  # type: ignore[attr-defined]  # graphs end before it
    return wrapper


def has_proxies() -> bool:
    """Whether make_fx or torch.export traces this call."""
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")  # slow to import, and whoever traces has done so
    return proxies is not None and proxies.get_proxy_mode() is not None


def constant_when_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """As torch.compiler.assume_constant_result: a graph has the result of one call."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_MARK = "switchgear_original"  # of functions of other libraries


def extend_once(owner: Any, name: str, extended: Callable[[Any], Any]) -> None:
    """Replaces a function of a class or a module by extended(function). Does nothing if that has been done, or if the
    owner is None or lacks it, as in other versions of a library."""
    original = getattr(owner, name, None)
    if original is not None and not is_extended(original):
        function = extended(original)
        setattr(function, _MARK, original)
        setattr(owner, name, function)


def is_extended(function: Any) -> bool:
    return hasattr(function, _MARK)
