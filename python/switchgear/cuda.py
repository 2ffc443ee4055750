# SPDX-License-Identifier: BSD-3-Clause
"""CUDA devices: whether this build has kernels for a device, and the stream and memory that ops use there."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from switchgear.checks import Count, checked

OLDEST = (8, 0)  # compute capability: the first with cp.async and bfloat16 tensor cores
NO_MODULE = (
    "this build has no CUDA module: it was built where there was no GPU or no CUDA compiler (nvcc); "
    "SWITCHGEAR_CUDA=ON pip install builds it"
)


@functools.cache
def _load() -> tuple[Any, str | None]:
    """The module `_cuda`, or None and the reason. Loaded with the first CUDA tensor, because it is large."""
    try:
        return importlib.import_module("switchgear._cuda"), None
    except ModuleNotFoundError:
        return None, NO_MODULE
    except ImportError as error:
        return None, f"the CUDA module does not load ({error})"


def module() -> Any:
    """`switchgear._cuda`. Raises RuntimeError with the reason if this build has none."""
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(f"switchgear: {reason}")
    return loaded


def cuda_kernels() -> str:
    """The kernels of products on CUDA devices: "auto" (those of the device's generation) or "sm_80"."""
    return str(module().cuda_kernels())


def set_cuda_kernels(kernels: str) -> None:
    """Selects the kernels of later products on CUDA devices, in all threads: "auto", or "sm_80", which every supported
    device runs, for comparisons. The environment variable SWITCHGEAR_CUDA_KERNELS sets the first choice. Raises
    ValueError for another name, RuntimeError if this build has no CUDA kernels."""
    module().set_cuda_kernels(kernels)


def has_code(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a device can run code for one of `archs`. Machine code "sm_80" runs on the same major version from that
    minor version on. PTX "compute_80" also runs on all later ones. With suffix "a", both need exactly that version."""
    major, minor = capability
    for arch in archs:
        kind, _, version = arch.partition("_")
        number = int(version.rstrip("af"))
        built = divmod(number, 10)
        if version.endswith("a"):
            runs = capability == built
        elif version.endswith("f") or kind == "sm":
            runs = major == built[0] and minor >= built[1]
        else:
            runs = capability >= built
        if runs:
            return True
    return False


def _version(number: int) -> str:
    """As CUDA counts versions: 12040 is 12.4."""
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def reason_against(index: int) -> str | None:
    """Why the ops have no kernels on cuda:`index`, or None if they have."""
    loaded, reason = _load()
    if loaded is None:
        return reason
    if torch.version.hip is not None:  # torch calls these devices "cuda" too, with numbers that look like capabilities
        return f"torch {torch.__version__} is built for ROCm"
    capability = torch.cuda.get_device_capability(index)
    name = f"cuda:{index} ({torch.cuda.get_device_name(index)}, compute capability {capability[0]}.{capability[1]})"
    if capability < OLDEST:
        return f"{name} is older than compute capability {OLDEST[0]}.{OLDEST[1]}"
    driver, runtime = loaded.driver_version(), loaded.runtime_version()
    if driver // 1000 < runtime // 1000:  # of the same major version, an older driver serves too
        return f"this build needs a driver for CUDA {runtime // 1000}, that of {name} is for {_version(driver)}"
    archs = loaded.built_archs()
    return None if has_code(archs, capability) else f"this build has code for {', '.join(archs)}, but not for {name}"


def require(index: int = 0) -> None:
    """Raises RuntimeError with the reason unless the ops have kernels on cuda:`index`."""
    loaded = module()
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            raise RuntimeError(f"switchgear: CUDA was requested, but torch {torch.__version__} is built without CUDA")
        driver = loaded.driver_version()
        what = "no CUDA device is visible" if driver else "there is no CUDA driver on this machine"
        raise RuntimeError(f"switchgear: CUDA was requested, but {what}")
    reason = reason_against(index)
    if reason is not None:
        raise RuntimeError(f"switchgear: {reason}")


def current(index: int) -> AbstractContextManager[object]:
    """A context in which the device is torch's current one."""
    return nullcontext() if torch.cuda.current_device() == index else torch.cuda.device(index)


def allow_tf32() -> bool:
    """Whether torch uses TF32 for its own float32 products on CUDA."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9; reading the old name raises once this one is set
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


# The counts in force, of the process and not of a thread or context: backward runs on threads of autograd.
_reserved: list[int] = []


@checked
@contextmanager
def reserved_multiprocessors(count: Count) -> Iterator[None]:
    """Inside, grouped GEMMs leave `count` multiprocessors of a GPU to kernels of other streams, such as collectives
    that overlap them. At least one stays with the GEMM. Applies to the whole process; of nested and concurrent counts
    the largest. Transfers of ExpertParallel's peer_memory reserve their own."""
    _reserved.append(count)
    try:
        yield
    finally:
        _reserved.remove(count)


def num_reserved() -> int:
    """The multiprocessors that grouped GEMMs leave to others now."""
    return max(_reserved, default=0)


class Execution:
    """Creates the last argument of `_cuda`'s functions: torch's current stream, and memory from torch's allocator."""

    def __init__(self, module: Any, index: int) -> None:
        self._new = module.Execution
        self._index = index
        self._allocate = functools.partial(torch.empty, dtype=torch.uint8, device=torch.device("cuda", index))

    def __call__(self) -> Any:
        stream = torch.cuda.current_stream(self._index).cuda_stream
        return self._new(stream, self._allocate, allow_tf32(), num_reserved())
