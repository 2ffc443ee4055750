# SPDX-License-Identifier: BSD-3-Clause
"""Selects the implementation that runs an op.

"native" runs the kernels where they exist, on the CPU and on CUDA devices (cuda.py decides which); float64, and devices
without kernels, use the reference. "reference" uses reference/ for everything. The environment variable
SWITCHGEAR_BACKEND sets the choice at import; use_backend changes it temporarily. The choice applies to the whole
process, since backward passes may run in other threads.

The first CUDA tensor that runs on the reference raises a RuntimeWarning; with SWITCHGEAR_STRICT=1 it is an error. The
same holds for a weight format without kernels on a device.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("native", "reference")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_backend = _default = _checked(os.environ.get("SWITCHGEAR_BACKEND") or "native", "SWITCHGEAR_BACKEND")
_blocks: dict[object, str] = {}  # of use_backend, in the order in which they were entered
_lock = Lock()
_warned_about: set[str] = set()


def _is_strict() -> bool:
    if (value := os.environ.get("SWITCHGEAR_STRICT", "")) not in ("", "0", "1"):
        raise ValueError(f"SWITCHGEAR_STRICT: expected 0 or 1, got {value!r}")
    return value == "1"


_is_strict()  # a wrong value is named at import


def backend() -> str:
    """The backend in use: "native" or "reference"."""
    return _backend


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the ops inside the block on the backend `name`, in all threads. Of blocks that overlap in several
    threads, the last one that was entered decides. Raises ValueError if `name` is unknown."""
    block = object()
    with _lock:
        _blocks[block] = _checked(name, "use_backend")
        _use_last_block()
    try:
        yield
    finally:
        with _lock:
            del _blocks[block]
            _use_last_block()


def _use_last_block() -> None:
    global _backend
    _backend = next(reversed(_blocks.values()), _default)


def runs_natively(dtype: torch.dtype) -> bool:
    """Whether kernels run an op on tensors of `dtype`, if the device has kernels."""
    return _backend == "native" and dtype is not torch.float64


def in_autocast(device_type: str) -> bool:
    """Whether torch.autocast is enabled for a device type."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # torch raises for meta


def cast_in_autocast(device_type: str, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Casts the floating tensors to autocast's dtype, except float64 (as torch does)."""
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dtype is torch.float64 or not tensor.is_floating_point():
            return tensor
        return tensor.to(dtype)

    return tuple(map(cast, tensors))


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context in which arithmetic uses the dtypes of the tensors."""
    return torch.autocast(device_type, enabled=False) if in_autocast(device_type) else nullcontext()


def announce_reference(device: torch.device, reason: str | None = None) -> None:
    """Warns, once per device type, that it has no kernels, and why; RuntimeError if SWITCHGEAR_STRICT=1."""
    message = f"switchgear has no kernels for {device.type}: its ops run on the reference in plain torch, slowly"
    _announce(device.type, message if reason is None else f"{message} ({reason})")


def announce_format(device: torch.device, weights: str, remedy: str = "ops run on the reference") -> None:
    """Like announce_reference, for weights, once each. remedy: what happens instead of a kernel."""
    message = f"switchgear has no kernels for {weights} on {device.type}: {remedy}, slowly"
    _announce(f"{weights} on {device.type}", message)


def _announce(subject: str, message: str) -> None:
    if _backend == "reference" or subject in _warned_about:
        return
    if _is_strict():
        raise RuntimeError(message)
    _warned_about.add(subject)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def warn_once(message: str, stacklevel: int = 2) -> None:
    """One warning per message and process, since a module runs many times. stacklevel: as seen from the caller."""
    if message not in _warned_about:
        _warned_about.add(message)
        warnings.warn(f"switchgear: {message}", stacklevel=stacklevel + 1)
