# SPDX-License-Identifier: BSD-3-Clause
"""Adapters of models as GGUF files for llama.cpp: tensors <tensor of the model>.lora_a [r,in] and .lora_b [out,r], of
experts [E,r,in] and [E,out,r]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchgear.adapters.wrappers import is_wrapper, lend_factors
from switchgear.checks import checked
from switchgear.files import AnyPath
from switchgear.integrations.forwards import unwrap_part
from switchgear.integrations.gguf import is_same
from switchgear.integrations.gguf_architectures import (
    ARCHITECTURE,
    HEAD,
    Architecture,
    choose_architecture,
    find_layout,
    name_experts,
    name_module,
    name_parameter,
    reorder_heads,
    take_part,
)
from switchgear.integrations.gguf_file import GgufTensor, Value, write_gguf
from switchgear.utils.modules import unwrap_peft
from switchgear.weights.adapted import adapters_of
from switchgear.weights.form import Layout

__all__ = ["save_gguf_adapter"]


class _Adapter(NamedTuple):
    """A matrix gets + scale · b·a."""

    a: Tensor  # [r,in], of experts [E,r,in]
    b: Tensor  # [out,r] or [E,out,r]
    scale: float


@checked
def save_gguf_adapter(model: nn.Module, path: AnyPath) -> None:
    """Writes the active adapters of a model as a GGUF file, which llama.cpp adds to the model's own one.

        switchgear.save_gguf_adapter(peft.get_peft_model(switchgear.load_gguf(base), config), "adapter.gguf")

    Several active adapters become one. Factors are float32; the file has no dropout.

    Args:
        model: of an architecture that `save_gguf` takes, with LoRA adapters of PEFT on linear layers and on experts
            (target_parameters), or of `adapters.add_lora` on experts, which run on switchgear.

    Raises:
        ValueError: another architecture; no active adapter; adapters that are merged, of another kind (DoRA, trained
            biases or copies of modules), of an embedding, a head that shares its weight, or a matrix that files split;
            numbers that are not finite. The message names the module. OSError: the file cannot be written.
    """
    base: Any = unwrap_peft(model)
    name, known = choose_architecture(base)
    _check_biases(model)
    found: dict[str, list[_Adapter]] = {}
    for tensor, adapter in _list_adapters(base, known):
        found.setdefault(tensor, []).append(adapter)
    if not found:
        raise ValueError("model: expected active LoRA adapters, got none")
    joined = {tensor: _join(adapters) for tensor, adapters in found.items()}
    # The reader's scale is alpha / rank. Other ones go into b.
    alpha = next((alpha for each in joined.values() if (alpha := each.scale * each.a.shape[-2])), 1.0)
    tensors = {}
    for tensor, (a, b, scale) in joined.items():
        factor = scale * a.shape[-2] / alpha
        for letter, data in (("a", a), ("b", b if factor == 1 else b * factor)):
            tensors[f"{tensor}.lora_{letter}"] = GgufTensor("f32", tuple(data.shape), data.contiguous())
    texts = {ARCHITECTURE: name, "general.type": "adapter", "adapter.type": "lora"}
    metadata = {key: Value("string", text) for key, text in texts.items()}
    write_gguf(path, metadata | {"adapter.lora.alpha": Value("float32", alpha)}, tensors)


def _check_biases(model: Any) -> None:
    for adapter, config in getattr(model, "peft_config", {}).items():
        if (bias := getattr(config, "bias", "none")) != "none":
            raise ValueError(f"model.peft_config[{adapter!r}].bias: expected 'none', got {bias!r}")


def _join(adapters: Sequence[_Adapter]) -> _Adapter:
    """One adapter of the sum of ranks, in float32."""
    scales = {adapter.scale for adapter in adapters}
    if len(scales) > 1:
        adapters = [_Adapter(a, b * scale, 1.0) for a, b, scale in adapters]
    a, b = torch.cat([adapter.a for adapter in adapters], -2), torch.cat([adapter.b for adapter in adapters], -1)
    return _Adapter(a, b, adapters[0].scale)


def _list_adapters(model: Any, known: Architecture) -> Iterator[tuple[str, _Adapter]]:
    """Adapters by the name of their tensor, in CPU memory."""
    for path, module in model.named_modules():
        where = ".".join(part for part in path.split(".") if part != "base_layer")
        for own, adapter in _read_adapters(where, module, known):
            a, b = (factor.detach().float().cpu() for factor in adapter[:2])
            if not (a.isfinite().all() and b.isfinite().all()):
                raise ValueError(f"model.{where}.{own}: expected adapters of finite numbers")
            stem, name = name_module(where, known), name_parameter(where, own, known)
            if stem is not None and stem.endswith("exps"):
                layout = find_layout(unwrap_part(module), known)
                yield from _name_parts(where, own, layout, stem, _Adapter(a, b, adapter.scale))
                continue
            if name is None or name.split(".")[-2] in known.splits:
                raise ValueError(f"model.{where}.{own}: expected no adapter, which files of llama.cpp have no name for")
            if name == HEAD and is_same(_unwrap_linear(module), _unwrap_linear(model.get_input_embeddings())):
                raise ValueError(f"model.{where}: expected no adapter of a head that shares the embedding's weight")
            if known.has_interleaved_rope:
                b = reorder_heads(name, b, model.config, is_back=False)
            yield name, _Adapter(a, b, adapter.scale)


def _unwrap_linear(module: Any) -> nn.Module:
    """The layer in PEFT's wrapper of it."""
    layer: nn.Module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return layer


def _name_parts(
    where: str, own: str, layout: Layout | None, stem: str, adapter: _Adapter
) -> Iterator[tuple[str, _Adapter]]:
    if layout is None:
        raise ValueError(f"model.{where}: expected experts on switchgear; call accelerate(model) first")
    if own not in layout.names:
        raise ValueError(f"model.{where}.{own}: expected adapters of {' and '.join(layout.names)} alone")
    gate, up, down = name_experts(stem)
    if own == layout.names[1]:
        yield down, adapter
        return
    for index, name in enumerate((gate, up)):
        yield name, adapter._replace(b=take_part(adapter.b, 2, layout.split_gates, index))


def _read_adapters(where: str, module: Any, known: Architecture) -> Iterator[tuple[str, _Adapter]]:
    """The active adapters that a module holds, by the parameter that they adapt."""
    for own, lora in adapters_of(module).items():
        _check_merged(where, lora.merged is not None)
        a, b = (module.get_parameter(f"{own}_lora_{letter}") for letter in "AB")
        yield own, _Adapter(a, b, lora.scale)
    if not type(module).__module__.startswith("peft."):
        return
    _check_merged(where, getattr(module, "merged", False))
    if is_wrapper(module):
        if (factors := lend_factors(module)) is None:
            raise ValueError(f"model.{where}: expected adapters whose factors can be read, got others")
        layout = find_layout(unwrap_part(module), known)
        for left, right, scale in factors:
            is_swapped = left.dim() == 3 and layout is not None and layout.transposed
            pair = (left.mT, right.mT) if is_swapped else (right, left)
            yield module.parameter_name, _Adapter(*pair, scale)
        return
    if not hasattr(module, "lora_A") or not isinstance(module.get_base_layer(), nn.Linear):
        raise ValueError(f"model.{where}: expected LoRA adapters of linear layers or experts, got {type(module)}")
    for each in () if module.disable_adapters else module.active_adapters:
        if each in module.lora_variant or module.lora_bias.get(each):
            raise ValueError(f"model.{where}: expected plain LoRA, got {module.lora_variant.get(each, 'a bias')}")
        if each in module.lora_A:
            yield "weight", _Adapter(module.lora_A[each].weight, module.lora_B[each].weight, module.scaling[each])


def _check_merged(where: str, is_merged: bool) -> None:
    if is_merged:
        raise ValueError(f"model.{where}: expected adapters that are not merged; unmerge them first")
