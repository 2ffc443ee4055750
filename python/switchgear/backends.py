# SPDX-License-Identifier: BSD-3-Clause
"""Which implementation runs an op.

"native" runs the kernels wherever there are any, on the CPU and on CUDA devices (cuda.py says on which); float64, and
devices without kernels, go to the reference. "reference" runs reference.py for everything. The environment variable
SWITCHGEAR_BACKEND sets the choice at import, use_backend changes it for a while. The choice belongs to the process:
backward passes may run in threads of their own.

A CUDA tensor that ends up in the reference says so once, as a RuntimeWarning; with SWITCHGEAR_STRICT=1 it is an error.
So does a format of weights that the kernels of a device do not multiply.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

BACKENDS = ("native", "reference")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_backend = _checked(os.environ.get("SWITCHGEAR_BACKEND", "native"), "SWITCHGEAR_BACKEND")
_warned_about: set[str] = set()


def backend() -> str:
    """The backend in use: "native" or "reference"."""
    return _backend


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the ops inside the block on the backend `name`, in all threads. ValueError for an unknown one."""
    global _backend
    before, _backend = _backend, _checked(name, "use_backend")
    try:
        yield
    finally:
        _backend = before


def runs_natively(dtype: torch.dtype) -> bool:
    """Whether kernels take an op on tensors of `dtype`, where the device has any."""
    return _backend == "native" and dtype is not torch.float64


def in_autocast(device_type: str) -> bool:
    """Whether torch.autocast is on for a type of device."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # which raises for meta


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Inside, arithmetic happens in the dtypes that the tensors have."""
    return torch.autocast(device_type, enabled=False) if in_autocast(device_type) else nullcontext()


def announce_reference(device: torch.device, reason: str | None = None) -> None:
    """Warns, once per type of device, that it has no kernels, and why; RuntimeError if SWITCHGEAR_STRICT=1."""
    message = f"switchgear has no kernels for {device.type}: its ops run on the reference in plain torch, slowly"
    _announce(device.type, message if reason is None else f"{message} ({reason})")


def announce_format(device: torch.device, weights: str, remedy: str = "ops run on the reference") -> None:
    """The same of some weights, once for each: what happens instead of a kernel."""
    message = f"switchgear has no kernels for {weights} on {device.type}: {remedy}, slowly"
    _announce(f"{weights} on {device.type}", message)


def _announce(subject: str, message: str) -> None:
    if _backend == "reference" or subject in _warned_about:
        return
    if os.environ.get("SWITCHGEAR_STRICT") == "1":
        raise RuntimeError(message)
    _warned_about.add(subject)
    warnings.warn(message, RuntimeWarning, stacklevel=3)
