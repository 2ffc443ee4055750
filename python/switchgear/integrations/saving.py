# SPDX-License-Identifier: BSD-3-Clause
"""`save_pretrained` of transformers models with stored weights: a packed checkpoint (packed.py), or with plain=True the
plain weights that the forms represent.

A state dict of stored weights has the keys of their form, which `from_pretrained` does not know: it would initialise
them at random.

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
from switchgear.integrations import packed
from switchgear.utils.modules import extend_once
from switchgear.weights import stored_of
from switchgear.weights.adapted import adapters_of
from switchgear.weights.module import in_layout, is_packing, packed_keys, packing


def register() -> None:
    """Makes `PreTrainedModel.save_pretrained` write packed checkpoints of stored weights, or plain ones (plain=True).
    Models without them are saved as before. Adapters of `add_lora` keep their names."""
    extend_once(modeling_utils, "revert_weight_conversion", _extend_revert)
    extend_once(PreTrainedModel, "save_pretrained", _extend_save)


def _extend_revert(original: Any) -> Any:
    @functools.wraps(original)
    def revert_weight_conversion(model: nn.Module, state_dict: dict[str, Any]) -> dict[str, Any]:
        own = [*_list_adapter_keys(model), *(_list_packed_keys(model) if is_packing() else ())]
        kept = {key: state_dict[key] for key in own if key in state_dict}
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
    def save_pretrained(self: Any, *args: Any, plain: bool = False, **kwargs: Any) -> Any:
        stored = {name: s for name, module in self.named_modules() if (s := stored_of(module)) is not None}
        if not stored:
            return original(self, *args, **kwargs)
        forms = ", ".join(sorted({str(s.form) for s in stored.values()}))
        saves_adapters_alone = getattr(self, "_hf_peft_config_loaded", False)
        for each in () if saves_adapters_alone else stored.values():
            if not each.is_in_memory:
                raise ValueError(
                    f"model: its experts are {each.form}; call switchgear.offload.save_pretrained(model, path), "
                    "which reads them layer by layer"
                )
        call = signature.bind(self, *args, **kwargs)
        if call.arguments.get("distributed_checkpoint"):
            raise ValueError(
                f"distributed_checkpoint: expected False for weights stored as {forms}; "
                "call switchgear.restore(model) first"
            )
        given = call.arguments.get("state_dict")
        if plain or saves_adapters_alone or not all(map(packed.is_packable, stored.values())):
            if any(s.form.suffixes for s in stored.values()):
                warn_once(
                    f"save_pretrained writes the weights stored as {forms} as plain ones, rounded as they are; after "
                    "from_pretrained, call switchgear.accelerate(model) and switchgear.store as before"
                )
            call.arguments["state_dict"] = _replace_stored_keys(self, given)
            with _show_parameters(call.arguments["state_dict"], self):
                return original(*call.args, **call.kwargs)
        with packing(), _show_config(self, packed.config_of(stored.items())):
            call.arguments["state_dict"] = _pack(self, given)
            return original(*call.args, **call.kwargs)

    return save_pretrained


@contextmanager
def _show_config(model: Any, config: Any) -> Iterator[None]:
    """Within the block the model's config has this quantization_config."""
    model.config.quantization_config = config
    try:
        yield
    finally:
        del model.config.quantization_config


def _pack(model: nn.Module, given: dict[str, Any] | None) -> dict[str, Any]:
    """The state dict of a packed checkpoint, of which some may be given with the keys of the forms."""
    if given is None:
        state_dict = model.state_dict()
    else:
        state_dict = dict(given)
        for name, module in model.named_modules(remove_duplicate=False):
            if (stored := stored_of(module)) is not None:
                prefix = f"{name}." if name else ""
                old = {
                    f"{prefix}{own}{suffix}" for own in stored.layout.names for suffix in stored.form.suffixes or ("",)
                }
                if old <= state_dict.keys():
                    for key in old:
                        del state_dict[key]
                    state_dict.update((prefix + key, tensor) for key, tensor in stored.packed(module))
    seen: set[int] = set()
    for key in _list_packed_keys(model):
        if key in state_dict:
            tensor = state_dict[key].contiguous()
            memory = tensor.untyped_storage().data_ptr()
            state_dict[key] = tensor.clone() if memory in seen else tensor  # a file holds no shared memory
            seen.add(memory)
    return state_dict


def _list_packed_keys(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules(remove_duplicate=False):
        if (stored := stored_of(module)) is not None:
            prefix = f"{path}." if path else ""
            for name, projection in zip(stored.layout.names, stored.projections, strict=True):
                yield from (key for _, key in packed_keys(f"{prefix}{name}", projection.kind))


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
