# SPDX-License-Identifier: BSD-3-Clause
"""PEFT's LoRA adapters: a directory with adapter_config.json and adapter_model.safetensors (or .bin), and read_lora,
which reads those of Linear layers."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from torch import Tensor

from switchgear.checks import Finite, FiniteTensor, FloatingPoint, Range, Shape, Share, Size, convert
from switchgear.files import AnyPath, load_saved, read_json

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # All keys begin with it.
_Alpha = Annotated[float, Range(-(2**31), 2**31, "low high")]
OURS, BASE = "switchgear", "experts"  # Keys in the metadata of save_peft's files: of all, and the base's form.

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
    version: str  # PEFT's version; 0.17 and older wrote none

    def rank_of(self, layer: str) -> int | None:
        rank: int | None = _match(self.rank_pattern, layer, self.rank)
        return rank

    def alpha_of(self, layer: str, rank: int) -> float:
        """The alpha whose quotient by the rank is PEFT's scale."""
        alpha = float(_match(self.alpha_pattern, layer, self.alpha))
        return alpha * math.sqrt(rank) if self.use_rslora else alpha


def _match(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if _matches(pattern, layer)), default)


# ---- names and regular expressions -----------------------------------------------------------------------------------

_LONGEST = 1000  # characters of a pattern and of a name that is compared with patterns
_NAME = re.compile(r"[\w.-]+")
_TOKEN = re.compile(
    r"(?P<sign>\((?:\?:)?|\)\??|[|^$])"
    r"|(?P<one>\\[dDwWsS]|\\[^a-zA-Z0-9]|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\()\[\]{}|^$*+?])"
    r"(?:(?P<times>[*+?]|\{\d+(?:,\d*)?\})\??)?"
)
_TIMES: dict[str | None, tuple[int, float]] = {None: (1, 1), "?": (0, 1), "*": (0, math.inf), "+": (1, math.inf)}


class _Token(NamedTuple):
    """A sign, such as a bracket of a group, or one character and how often it comes."""

    sign: str
    one: re.Pattern[str] | None
    least: int
    most: float


@lru_cache(maxsize=1024)
def _tokenize(pattern: str) -> list[_Token]:
    """A pattern of names: characters, classes of characters, repeats of one of these, and groups of alternatives.
    ValueError for any other regular expression. Python's `re` could take years for those that repeat groups."""
    if len(pattern) > _LONGEST:
        raise ValueError(f"it has {len(pattern)} characters, more than {_LONGEST}")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None
    tokens, at = [], 0
    while at < len(pattern):
        if (match := _TOKEN.match(pattern, at)) is None:
            raise ValueError(f"of regular expressions, it may not use {pattern[at : at + 9]!r}")
        sign, one, times = match.group("sign", "one", "times")
        if times in _TIMES:
            least, most = _TIMES[times]
        else:
            low, comma, high = times[1:-1].partition(",")
            least, most = int(low), float(high or math.inf) if comma else int(low)
        tokens.append(_Token(sign or "", re.compile(one) if one else None, least, most))
        at = match.end()
    return tokens


def _matches(pattern: str, name: str) -> bool:
    """Whether re.match(rf"(.*\\.)?({pattern})$", name) finds something. It follows all ways to match at once, as the
    set of places in the name that they have come to, so the time is at most the product of both lengths."""
    if len(name) > _LONGEST:
        raise ValueError(f"rank_pattern: expected names of at most {_LONGEST} characters, got {name[:80]}…")
    if _NAME.fullmatch(pattern):  # nearly all of them: the same, and faster
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    places = {0, *(place + 1 for place, character in enumerate(name) if character == ".")}
    groups: list[tuple[set[int], set[int]]] = [(places, set())]  # where each begins, and where its alternatives end
    for token in _tokenize(pattern):
        if token.one is not None:
            places = _repeat(token, name, places)
        elif token.sign.startswith("("):
            groups.append((places, set()))
        elif token.sign == "|":
            groups[-1][1].update(places)
            places = groups[-1][0]
        elif token.sign.startswith(")"):
            begin, ends = groups.pop()
            places = places | ends | (begin if token.sign == ")?" else set())
        else:
            places = places & {0 if token.sign == "^" else len(name)}
    return len(name) in places | groups[0][1]


def _repeat(token: _Token, name: str, places: set[int]) -> set[int]:
    found, count = set[int]() if token.least else set(places), 0
    while places and count < token.most:
        assert token.one is not None
        places = {place + 1 for place in places if place < len(name) and token.one.match(name[place])}
        count += 1
        if count >= token.least:
            places -= found
            found |= places
    return found


# ---- the configuration -----------------------------------------------------------------------------------------------


def parse_config(options: Any, where: str, plain: Mapping[str, tuple[Any, ...]], hint: str = "") -> PeftConfig:
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

    def read(option: str, kind: Any, value: Any) -> Any:
        try:
            return convert(option, value, kind)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{error} in {where}") from None

    def read_patterns(option: str, kind: Any) -> Mapping[str, Any]:
        patterns: Mapping[str, Any] = read(option, Mapping[str, kind], config.get(option) or {})
        for pattern in patterns:
            try:
                _tokenize(pattern)
            except ValueError as error:
                raise ValueError(f"{option}: expected names in {where}, got {pattern[:80]!r}: {error}") from None
        return patterns

    return PeftConfig(
        read("r", Size | None, config.get("r")),
        read("lora_alpha", _Alpha, config.get("lora_alpha")),
        read("lora_dropout", Share, config.get("lora_dropout") or 0.0),
        read_patterns("rank_pattern", Size),
        read_patterns("alpha_pattern", _Alpha),
        bool(config.get("use_rslora")),
        read("target_parameters", list[str], config.get("target_parameters") or []),
        str(config.get("peft_version") or ""),
    )


def import_safetensors() -> Any:
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
        return read_json(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: expected PEFT's {CONFIG}, got {file}: {error}") from error


def read_tensors(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a directory, and their metadata. name: what messages call the directory."""
    if not (folder / TENSORS).is_file() and (folder / PICKLED).is_file():
        return _unpickle(folder / PICKLED, name), {}
    if not (file := folder / TENSORS).is_file():
        raise ValueError(f"{name}: expected a directory with {TENSORS} or {PICKLED}, got {folder} with neither")
    import_safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  (not a mapping)
            return tensors, opened.metadata() or {}
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{name}: expected a safetensors file, got {file}: {error}") from error


def _unpickle(file: Path, name: str) -> dict[str, Tensor]:
    try:
        tensors = load_saved(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{name}: expected a dict of tensors in {file}, got {type(tensors).__name__}")
    return tensors


# ---- adapters of Linear layers ---------------------------------------------------------------------------------------


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
        layers = {layer: as_low_rank(f"{name}, {layer}", pair) for layer, pair in source.layers.items()}
        return replace(source, layers=layers)
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
    config = parse_config(options, f"the config of {name}", {"target_parameters": ([],)}, hint)
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
            f"{name}, {layer}", LowRank(pair["A"], pair["B"], _find_alpha(name, config, layer, pair["A"]))
        )
    return Adapter(layers)


def as_low_rank(name: str, adapter: Any, features: tuple[int, int] | None = None) -> LowRank:
    """(A, B, alpha) as a LowRank. Raises TypeError or ValueError, which `name`s it, for what is none, or does not fit a
    layer of `features` (in, out)."""
    if not isinstance(adapter, tuple) or len(adapter) != 3:
        raise TypeError(f"{name}: expected (A, B, alpha), got {type(adapter).__name__}")
    a, b, alpha = adapter
    sizes = {} if features is None else {"in": features[0], "out": features[1]}
    convert(f"{name}, A", a, Annotated[FiniteTensor, FloatingPoint, Shape("r", "in")], sizes)
    convert(f"{name}, B", b, Annotated[FiniteTensor, FloatingPoint, Shape("out", "r")], sizes)
    if 0 in sizes.values():
        raise ValueError(f"{name}: expected matrices with numbers, got shapes {list(a.shape)} and {list(b.shape)}")
    alpha = float(convert(f"{name}, alpha", alpha, Finite))
    return LowRank(a, b, alpha)


def _find_alpha(name: str, config: PeftConfig, layer: str, a: Any) -> float:
    rank = a.shape[0] if isinstance(a, Tensor) and a.dim() else 0
    if rank and (wanted := config.rank_of(layer)) not in (None, rank):
        raise ValueError(f"{name}, {layer}: expected rank {wanted}, that of its config, got A of shape {list(a.shape)}")
    return config.alpha_of(layer, rank)


def list_common_layers(adapters: Sequence[Adapter]) -> list[str]:
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
