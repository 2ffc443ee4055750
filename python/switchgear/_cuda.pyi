# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA devices of this machine, and what this build has for them. Only there if nvcc was at build time."""

from typing import TypedDict

class _DeviceInfo(TypedDict):
    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    total_memory: int  # bytes, as the next two
    l2_cache: int
    shared_memory_per_block: int
    kernel_ok: bool  # a kernel of this build ran
    kernel_arch: int  # __CUDA_ARCH__ of that kernel, e.g. 900
    kernel_error: str | None

def device_count() -> int: ...
def device_info(index: int) -> _DeviceInfo: ...
def driver_version() -> int: ...
def runtime_version() -> int: ...
def built_archs() -> list[str]: ...
