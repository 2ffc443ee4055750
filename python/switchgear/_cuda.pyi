# SPDX-License-Identifier: BSD-3-Clause
"""The ops of `_C` on CUDA devices, and queries about the devices and this build. Exists only if nvcc was found at build
time; imports without a driver.

Ops are queued on a stream and return at once. Values in device memory are not checked: invalid ids are empty slots.
"""

from collections.abc import Callable, Sequence
from typing import TypedDict

from switchgear._ops import *  # noqa: F403
from switchgear._ops import _Array

class _DeviceInfo(TypedDict):
    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    total_memory: int  # bytes, like the next two
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
def cuda_kernels() -> str: ...
def set_cuda_kernels(kernels: str) -> None: ...

class Execution:
    """How an op runs on a device.

    stream: a cudaStream_t; 0 is the default stream.
    allocate: takes a number of bytes and returns a flat array of that size on the device. Its memory is reused in
        stream order.
    allow_tf32: whether float32 products may round their inputs to TF32.
    reserved_multiprocessors: that grouped GEMMs leave to kernels of other streams.
    """

    def __init__(
        self,
        stream: int,
        allocate: Callable[[int], _Array],
        allow_tf32: bool = False,
        reserved_multiprocessors: int = 0,
    ) -> None: ...

def exchange_segment_bytes(num_ranks: int, slot_bytes: int) -> int:
    """The bytes of a rank's segment, which all ranks map. It must be zero at first."""

def exchange_multiprocessors(num_ranks: int) -> int:
    """The multiprocessors of the current device that the kernel fills, which others must leave for it to start."""

def exchange(
    inputs: tuple[_Array, Sequence[int], Sequence[int], Sequence[int], Sequence[int]],
    options: tuple[Sequence[int], int, int, int],
    outputs: tuple[_Array],
    execution: Execution,
) -> None:
    """inputs: rows, send_bytes, receive_bytes, first_sent, first_received. options: segments, rank, slot_bytes, stop.
    outputs: received.

    Sends send_bytes[r] of rows to each rank r, in order, and receives receive_bytes[r] from it, through the ranks'
    segments (addresses in this process). first_sent and first_received [W]: numbers of slot_bytes pieces in all earlier
    calls. A nonzero word at the address `stop` ends the kernel."""
