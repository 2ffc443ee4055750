# SPDX-License-Identifier: BSD-3-Clause
"""read_lora: adapters of Linear layers, from PEFT's files, from its state dicts, or from tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from switchgear.adapters.peft_format import PeftConfig, peft_config, read_config, read_tensors
from switchgear.files import AnyPath
from switchgear.reference import check_finite


class LowRank(NamedTuple):
    """One adapter of one Linear: alpha / r · B A is added to its weight."""

    a: Tensor  # [r,in]
    b: Tensor  # [out,r]
    alpha: float

    @property
    def rank(self) -> int:
        """r of A [r,C] and B [N,r]."""
        return int(self.a.shape[0])


@dataclass(frozen=True)
class Adapter:
    """An adapter of a model: a LowRank for each of its Linear layers, by the layer's name.

    gates: the vector [in] of a trained gate for each layer (see train_gate), or none.
    """

    layers: Mapping[str, LowRank]
    gates: Mapping[str, Tensor] | None = None


Source = Adapter | Mapping[str, Any] | AnyPath | tuple[Mapping[str, Tensor], Any]

_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<letter>[AB])(?:\.[^.]+)?\.weight$")


def read_lora(source: Source, name: str = "adapter") -> Adapter:
    """A LoRA adapter of PEFT.

    Args:
        source: a folder with adapter_config.json and adapter_model.safetensors (or adapter_model.bin); or a tuple of
            a state dict and its LoraConfig (or a dict with r, lora_alpha, …). Ranks and scales may differ between
            layers (rank_pattern, alpha_pattern, use_rslora).
        name: what error messages call it.

    Raises:
        ValueError: an adapter that is more than low-rank matrices of Linear layers (DoRA, biases, other trained
            modules, parameters of experts), a missing or wrong file, or numbers that are not finite.
    """
    if isinstance(source, Adapter):
        if not isinstance(source.layers, Mapping):
            raise TypeError(f"{name}: expected layers to be a dict, got {type(source.layers).__name__}")
        if not source.layers:
            raise ValueError(f"{name}: expected adapters of at least one layer, got none")
        return source
    if isinstance(source, (str, os.PathLike)):
        options = read_config(Path(source), name)
        tensors: Mapping[str, Tensor] = read_tensors(Path(source), name)[0]
    elif isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Mapping):
        tensors, options = source
    elif isinstance(source, Mapping):
        raise ValueError(f"{name}: expected (state dict, config), as alpha is in the config, got a state dict alone")
    else:
        raise TypeError(f"{name}: expected a folder, an Adapter or (state dict, config), got {type(source).__name__}")
    hint = "; switchgear.adapters.load_peft reads those"
    config = peft_config(options, f"the config of {name}", {"target_parameters": ([],)}, hint)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise ValueError(f"{name}: expected keys <layer>.lora_A.weight and <layer>.lora_B.weight, got {key}")
        layer, letter = match["layer"], match["letter"]
        if letter in pairs.setdefault(layer, {}):
            raise ValueError(f"{name}: expected one adapter, got two lora_{letter} of {layer}")
        if isinstance(tensor, Tensor) and not tensor.is_floating_point():
            raise ValueError(f"{name}: expected floating tensors, got {key} in {tensor.dtype}")
        pairs[layer][letter] = tensor
    if not pairs:
        raise ValueError(f"{name}: expected adapters of at least one layer, got none")
    layers = {}
    for layer, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{name}: expected lora_A and lora_B of {layer}, got lora_{next(iter(pair))} alone")
        layers[layer] = as_low_rank(
            f"{name}, {layer}", LowRank(pair["A"], pair["B"], _alpha(name, config, layer, pair["A"]))
        )
    return Adapter(layers)


def as_low_rank(name: str, adapter: Any, features: tuple[int, int] | None = None) -> LowRank:
    """A checked LowRank. features: (in, out) of the layer that it is for."""
    if not isinstance(adapter, tuple) or len(adapter) != 3:
        raise TypeError(f"{name}: expected (A, B, alpha), got {type(adapter).__name__}")
    a, b, alpha = adapter
    for letter, tensor in (("A", a), ("B", b)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: expected {letter} to be a floating tensor, got {kind}")
        if tensor.dim() != 2 or 0 in tensor.shape:
            raise ValueError(f"{name}: expected {letter} to be a matrix, got shape {list(tensor.shape)}")
    (rank, size_in), (size_out, rank_of_b) = a.shape, b.shape
    if rank != rank_of_b:
        raise ValueError(
            f"{name}: expected B of shape [out, {rank}], for A of shape {[rank, size_in]}, got {list(b.shape)}"
        )
    if features is not None and (size_in, size_out) != tuple(features):
        raise ValueError(
            f"{name}: expected A [r, {features[0]}] and B [{features[1]}, r], got {list(a.shape)} and {list(b.shape)}"
        )
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise TypeError(f"{name}: expected alpha to be a number, got {type(alpha).__name__}")
    check_finite(f"{name}, alpha", float(alpha))
    for letter, tensor in (("A", a), ("B", b)):
        if not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers in {letter}, got NaN or infinity")
    return LowRank(a, b, float(alpha))


def _alpha(name: str, config: PeftConfig, layer: str, a: Any) -> float:
    rank = a.shape[0] if isinstance(a, Tensor) and a.dim() else 0
    if rank and (wanted := config.rank_of(layer)) not in (None, rank):
        raise ValueError(f"{name}, {layer}: expected rank {wanted}, that of its config, got A of shape {list(a.shape)}")
    return config.alpha_of(layer, rank)


def layers_in_all(adapters: Sequence[Adapter]) -> list[str]:
    """The layers of the adapters. ValueError if they differ."""
    first = set(adapters[0].layers)
    for number, adapter in enumerate(adapters):
        if different := sorted(first ^ set(adapter.layers)):
            where = "lacks" if different[0] in first else "adds"
            raise ValueError(
                f"adapters[{number}]: expected the layers of adapters[0]; it {where} {different[0]}"
                + (f" and {len(different) - 1} more differ" if len(different) > 1 else "")
            )
    return list(adapters[0].layers)
