# SPDX-License-Identifier: BSD-3-Clause
"""What routers, losses, controllers and selections count in training, call by call."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def uncounted_on_failure(router: nn.Module) -> Iterator[None]:
    """If the block raises, nothing in the router has counted its call: what parts name in `counted` is as before."""
    parts = [part for part in router.modules() if hasattr(part, "counted")]
    before = [(part, {name: _copied(getattr(part, name)) for name in part.counted}) for part in parts]
    try:
        yield
    except BaseException:
        for part, values in before:
            for name, value in values.items():
                _restore(part, name, value)
        raise


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)


def _restore(part: nn.Module, name: str, value: Any) -> None:
    if name in part._buffers:
        getattr(part, name).copy_(value)
    else:
        setattr(part, name, value)
