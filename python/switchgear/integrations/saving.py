# SPDX-License-Identifier: BSD-3-Clause
"""`save_pretrained` of transformers models with stored experts.

A state dict of stored experts has the keys of their form, which `from_pretrained` does not know: it would initialise
the experts at random. So checkpoints of transformers get the plain weights that the form represents.

Adapters keep the names of the model, even where a checkpoint has others: only `load_state_dict` reads them again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel, modeling_utils

from switchgear.backends import warn_once
from switchgear.utils.modules import extend_once
from switchgear.weights import stored_of
from switchgear.weights.adapted import adapters_of
from switchgear.weights.module import in_layout


def register() -> None:
    """Makes `PreTrainedModel.save_pretrained` write plain weights of stored experts. Models without them are saved as
    before. Adapters of `add_lora` keep their names."""
    extend_once(modeling_utils, "revert_weight_conversion", _extend_revert)
    extend_once(PreTrainedModel, "save_pretrained", _extend_save)


def _extend_revert(original: Any) -> Any:
    @functools.wraps(original)
    def revert_weight_conversion(model: nn.Module, state_dict: dict[str, Any]) -> dict[str, Any]:
        kept = {key: state_dict[key] for key in _list_adapter_keys(model) if key in state_dict}
        rest = {key: tensor for key, tensor in state_dict.items() if key not in kept}
        return {**original(model, rest), **kept}

    return revert_weight_conversion


def _list_adapter_keys(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules(remove_duplicate=False):
        for name in adapters_of(module):
            for letter in "AB":
                yield f"{path}.{name}_lora_{letter}" if path else f"{name}_lora_{letter}"


def _extend_save(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        forms = {str(s.form): s.form for module in self.modules() if (s := stored_of(module)) is not None}
        if not forms:
            return original(self, *args, **kwargs)
        saves_adapters_alone = getattr(self, "_hf_peft_config_loaded", False)
        for module in () if saves_adapters_alone else self.modules():
            stored = stored_of(module)
            if stored is not None and not stored.is_in_memory:
                raise ValueError(
                    f"model: its experts are {stored.form}; call switchgear.offload.save_pretrained(model, path), "
                    "which reads them layer by layer"
                )
        call = signature.bind(self, *args, **kwargs)
        if call.arguments.get("distributed_checkpoint"):
            raise ValueError(
                f"distributed_checkpoint: expected False for experts stored as {', '.join(forms)}; "
                "call switchgear.restore(model) first"
            )
        given = call.arguments.get("state_dict")
        state_dict = call.arguments["state_dict"] = _replace_stored_keys(self, given)
        what = "model" if len(forms) == 1 else "experts"  # each form has its own layers
        for name, form in forms.items():
            if form.suffixes:
                again = ", ".join([what, repr(form.name), *form.options()])
                warn_once(
                    f"save_pretrained writes the experts stored as {name} as plain weights; after from_pretrained, "
                    f"call switchgear.accelerate(model) and switchgear.store({again})"
                )
        with _show_parameters(state_dict, self):
            return original(*call.args, **call.kwargs)

    return save_pretrained


@contextmanager
def _show_parameters(state_dict: dict[str, Any], model: nn.Module) -> Iterator[None]:
    """transformers' conversions ask the model for parameters, to know their shapes. Those of stored experts are only in
    the state dict."""

    def get_parameter(target: str) -> Any:
        try:
            return type(model).get_parameter(model, target)
        except AttributeError:
            if target not in state_dict:
                raise
            return state_dict[target]

    vars(model)["get_parameter"] = get_parameter
    try:
        yield
    finally:
        del vars(model)["get_parameter"]


def _replace_stored_keys(model: nn.Module, given: dict[str, Any] | None) -> dict[str, Any]:
    state_dict: dict[str, Any] = dict(model.state_dict() if given is None else given)
    for name, module in model.named_modules(remove_duplicate=False):
        stored = stored_of(module)
        if stored is None or not stored.form.suffixes:
            continue
        for own, weight in zip(stored.layout.names, stored.weights(module), strict=True):
            key = f"{name}.{own}" if name else own
            if all(key + suffix in state_dict for suffix in stored.form.suffixes):
                for suffix in stored.form.suffixes:
                    del state_dict[key + suffix]
                state_dict[key] = in_layout(weight.plain(), stored.layout).contiguous()
    return state_dict
