# SPDX-License-Identifier: BSD-3-Clause
"""What routers, losses, controllers and selections count in training, call by call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def kept_counts(module: nn.Module) -> Callable[[], None]:
    """A function that puts back what parts of a router or a model, itself among them, have counted by now: what they
    name in `counted`."""
    parts: list[Any] = [part for part in module.modules() if hasattr(part, "counted")]
    before = [(part, name, _copied(getattr(part, name))) for part in parts for name in part.counted]

    def restore() -> None:
        for part, name, value in before:
            if name in part._buffers:
                getattr(part, name).copy_(value)
            else:
                setattr(part, name, value)

    return restore


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)
