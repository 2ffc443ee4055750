# SPDX-License-Identifier: BSD-3-Clause
"""The format of PEFT's LoRA adapters: a directory with adapter_config.json and adapter_model.safetensors (or .bin)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of keys
OURS = "switchgear"  # in the metadata of files that save_peft wrote

# Options of LoraConfig that change what is computed or the base (PiSSA, …), and their values that do not, besides None.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "use_dora": (False,), "bias": ("none",), "lora_bias": (False,), "modules_to_save": ([],),
    "layer_replication": ([],), "trainable_token_indices": ([],), "alora_invocation_tokens": ([],),
    "use_qalora": (False,), "arrow_config": (), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}  # fmt: skip


@dataclass(frozen=True)
class PeftConfig:
    """A checked LoraConfig. The options of a layer are those of the first pattern that matches the end of its name."""

    rank: int | None  # None: that of the tensors
    alpha: float
    dropout: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    target_parameters: list[str]
    version: str  # of PEFT; 0.17 and older wrote none

    def rank_of(self, layer: str) -> int | None:
        rank: int | None = _matching(self.rank_pattern, layer, self.rank)
        return rank

    def alpha_of(self, layer: str, rank: int) -> float:
        """The alpha whose quotient by the rank is PEFT's scale."""
        alpha = float(_matching(self.alpha_pattern, layer, self.alpha))
        return alpha * math.sqrt(rank) if self.use_rslora else alpha


def _matching(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer)), default)


def peft_config(options: Any, where: str, plain: Mapping[str, tuple[Any, ...]], hint: str = "") -> PeftConfig:
    """Checks a LoraConfig, or its dict.

    Args:
        where: the config's name in messages.
        plain: further options whose values other than these are refused; hint: what to do about those.

    Raises ValueError that names the option.
    """
    found = options.to_dict() if hasattr(options, "to_dict") else options
    if not isinstance(found, Mapping):
        raise ValueError(f"config: expected a LoraConfig or a dict in {where}, got {type(found).__name__}")
    config = {name: getattr(value, "value", value) for name, value in found.items()}  # peft_type is an enum
    for option, values in {**_PLAIN, **plain}.items():
        if (got := config.get(option)) is not None and got not in values:
            wanted = repr(values[0]) if values else "None"
            raise ValueError(f"{option}: expected {wanted} in {where}, got {got!r}" + (hint if option in plain else ""))
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    if rank is not None and not _is_rank(rank):
        raise ValueError(f"r: expected a positive integer in {where}, got {rank!r}")
    if not _is_alpha(alpha):
        raise ValueError(f"lora_alpha: expected a number in {where}, got {alpha!r}")
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout: expected a number in [0, 1) in {where}, got {dropout!r}")
    names = config.get("target_parameters") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"target_parameters: expected a list of names in {where}, got {names!r}")
    return PeftConfig(
        rank, float(alpha), float(dropout),
        _patterns(config, "rank_pattern", where), _patterns(config, "alpha_pattern", where),
        bool(config.get("use_rslora")), names, str(config.get("peft_version") or ""),
    )  # fmt: skip


def _patterns(config: Mapping[str, Any], option: str, where: str) -> Mapping[str, Any]:
    patterns, is_valid = config.get(option) or {}, _is_rank if option == "rank_pattern" else _is_alpha
    wanted = "positive integers" if option == "rank_pattern" else "numbers"
    if not isinstance(patterns, Mapping) or not all(is_valid(value) for value in patterns.values()):
        raise ValueError(f"{option}: expected {wanted} by name in {where}, got {patterns!r}")
    for pattern in patterns:
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise ValueError(f"{option}: expected names in {where}, got {pattern!r}: {error}") from None
    return patterns


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_alpha(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -(2**31) < value < 2**31


def safetensors() -> Any:
    """The module safetensors.torch, or ImportError that says what to install."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("PEFT's format needs safetensors: pip install safetensors") from error
    return safetensors.torch


def read_config(folder: Path, name: str) -> Any:
    """The JSON of a directory. name: what messages call the directory."""
    file = folder / CONFIG
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected PEFT's {CONFIG}, got {file}: {error}") from error


def read_tensors(folder: Path, name: str) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a directory, and whether save_peft wrote them. name: what messages call the directory."""
    if not (folder / TENSORS).is_file() and (folder / PICKLED).is_file():
        return _unpickled(folder / PICKLED, name), False
    if not (file := folder / TENSORS).is_file():
        raise ValueError(f"{name}: expected a directory with {TENSORS} or {PICKLED}, got {folder} with neither")
    safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  (not a mapping)
            return tensors, OURS in (opened.metadata() or {})
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{name}: expected a safetensors file, got {file}: {error}") from error


def _unpickled(file: Path, name: str) -> dict[str, Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for files of others
        raise ValueError(f"{name}: expected a file of torch.save, got {file} ({type(error).__name__})") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{name}: expected a dict of tensors in {file}, got {type(tensors).__name__}")
    return tensors
