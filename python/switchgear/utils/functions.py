# SPDX-License-Identifier: BSD-3-Clause
"""Functions that torch.compile leaves out of its graphs, and functions of other libraries that are extended in place.

torch.compiler's decorators import torch's compiler, which takes longer than the import of torch. With these, it is
imported by whoever compiles.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


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


# ---- other libraries -------------------------------------------------------------------------------------------------


_MARK = "switchgear_original"


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
