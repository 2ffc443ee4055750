# SPDX-License-Identifier: BSD-3-Clause
"""Backends by name, as context managers for tests."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

import native_modules
import switchgear

# The instruction sets of this architecture. VNNI and neondot kernels differ from the others for quantised weights only.
if platform.machine() in ("aarch64", "arm64"):
    ISAS = ("generic", "neon")
    QUANTIZED_ISAS = ("generic", "neon", "neondot")
else:
    ISAS = ("generic", "avx2", "avx512", "avx512bf16")
    if "amx" in switchgear.available_cpu_isas():  # few processors have it; C++ tests emulate it elsewhere
        ISAS += ("amx",)
    QUANTIZED_ISAS = ("generic", "avx2", "avxvnni", "avx512", "avx512vnni", *ISAS[3:])

SIMT_DEVICES = {"simt": "sm_80", "simt-sm90": "sm_90"} if native_modules.SIMT_PATH else {}


@contextmanager
def kernels_of(isa: str) -> Iterator[None]:
    available = switchgear.available_cpu_isas()
    if isa not in available:
        pytest.skip(f"no {isa} kernels: this build on this processor has {', '.join(available)}")
    before = switchgear.cpu_isa()
    switchgear.set_cpu_isa(isa)
    with switchgear.use_backend("native"):
        yield
    switchgear.set_cpu_isa(before)


def backend_named(name: str) -> AbstractContextManager[None]:
    if name == "reference":
        return switchgear.use_backend("reference")
    if name in SIMT_DEVICES:
        return native_modules.simt_kernels(SIMT_DEVICES[name])
    return native_modules.cuda_kernels() if name == "cuda" else kernels_of(name)
