# SPDX-License-Identifier: BSD-3-Clause
"""Values of a recipe that suit no model, named before one is loaded. What depends on the model, its functions check."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from switchgear.compress.levels import METHODS
from switchgear.compress.merge import CLUSTERS, ROUTERS, SIMILARITIES
from switchgear.compress.prune import CRITERIA
from switchgear.compress.sparsify import METRICS

Check = tuple[str, Callable[[Any], bool]]  # what is expected, and whether a value is


def is_integer(value: Any, low: float, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any, low: float, high: float = math.inf) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_share(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < 1


def _one_of(names: tuple[str, ...]) -> Check:
    return f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names


def _keeps(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(ids, list) and all(is_integer(i, 0) for i in ids) for ids in value.values())
    return is_integer(value, 1) or _is_share(value)


def _are_bits(value: Any, most: int) -> bool:
    """A number, one per layer, or one per expert of each layer."""
    if isinstance(value, Mapping):
        return all(_are_bits(own, most) and not isinstance(own, Mapping) for own in value.values())
    if isinstance(value, list):
        return bool(value) and all(is_integer(each, 1, most) for each in value)
    return is_integer(value, 1, most)


def _are_domains(value: Any) -> bool:
    return (
        value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(d, str) for d in value))
    )


_SWITCH: Check = ("true or false", lambda value: isinstance(value, bool))
_COUNT: Check = ("an integer of at least 0", lambda value: is_integer(value, 0))
_POSITIVE: Check = ("a number of at least 0", lambda value: _is_number(value, 0, 1e300))

OPTIONS: dict[str, Check] = {
    "keep": ("a number of experts, a share in (0, 1), or ids by layer", _keeps),
    "criterion": _one_of(CRITERIA),
    "scope": _one_of(("layer", "global")),
    "replace": _one_of(("none", "constant")),
    "domains": ("names of domains, or null", _are_domains),
    "seed": _COUNT,
    "exact_subsets": _COUNT,
    "similarity": _one_of(SIMILARITIES),
    "cluster": _one_of(CLUSTERS),
    "align": _SWITCH,
    "router": _one_of(ROUTERS),
    "sparsity": ("a share in (0, 1) or '2:4'", lambda value: value == "2:4" or _is_share(value)),
    "metric": _one_of(METRICS),
    "group_size": ("0 or a multiple of 32", lambda value: is_integer(value, 0) and value % 32 == 0),
    "method": _one_of(METHODS),
    "symmetric": _SWITCH,
    "store": _SWITCH,
    "damping": _POSITIVE,
    "act_order": _SWITCH,
    "min_tokens": _COUNT,
}
MIXED: dict[str, Check] = {
    "of": ("bits from 1 on, ascending", lambda v: isinstance(v, list) and _are_bits(v, 8) and v == sorted(set(v))),
    "average": ("a number of bits", lambda value: _is_number(value, 1, 8)),
    "alpha": _POSITIVE,
    "beta": _POSITIVE,
    "gamma": _POSITIVE,
    "tolerance": ("null or a number of at least 0", lambda value: value is None or _is_number(value, 0)),
}


def mistake(options: Mapping[str, Any], *, distributes_bits: bool) -> str | None:
    """The first wrong value, as "name: expected …, got …"."""
    for name, value in options.items():
        if name == "bits":
            found = _mistake_of_bits(value, 4 if options.get("store", True) else 8, distributes_bits)
        else:
            found = _mistake(name, value, OPTIONS)
        if found:
            return found
    return None


def _mistake(name: str, value: Any, table: Mapping[str, Check]) -> str | None:
    expected, holds = table.get(name, ("", lambda _: True))
    return None if holds(value) else f"{name}: expected {expected}, got {value!r}"


def _mistake_of_bits(bits: Any, most: int, distributes: bool) -> str | None:
    if distributes:
        return next((found for name in bits if (found := _mistake(name, bits[name], MIXED))), None)
    if _are_bits(bits, most):
        return None
    return f"bits: expected 1 to {most}, of all experts, by layer or by expert, got {bits!r}"
