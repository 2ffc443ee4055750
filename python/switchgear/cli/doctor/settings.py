# SPDX-License-Identifier: BSD-3-Clause
"""What a check found, and the settings of the machine and of this process that cost speed."""

from __future__ import annotations

import importlib
import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...integrations import is_too_old
from ...utils.packages import first_line, installed_version, is_installed, missing_package
from .. import cgroup, machine

ALLOCATOR = " ".join(f"{name}={value}" for name, value in machine.TUNED_ALLOCATOR.items())


@dataclass(frozen=True)
class Finding:
    """verdict: ok; slow: it works, and could be faster; absent: a part that does not run here; broken: wrong results,
    or a package that cannot be imported. remedy: what to do about it, or empty."""

    subject: str
    verdict: str
    text: str
    remedy: str = ""

    @property
    def is_of_backend(self) -> bool:
        return self.subject.startswith(("CPU", "CUDA"))

    def __str__(self) -> str:
        indent = " " * 28
        lines = textwrap.wrap(self.text, 92)
        lines += textwrap.wrap(f"-> {self.remedy}", 92, subsequent_indent="   ") if self.remedy else []
        return f"{self.verdict:<8}{self.subject:<20}" + f"\n{indent}".join(lines or [""])


def check_settings(backend: str) -> Iterator[Finding]:
    """One finding per setting. backend: the one that ops run on."""
    if backend == "reference":
        yield Finding("backend", "slow", "all ops run on the reference, in plain torch", "unset SWITCHGEAR_BACKEND")
    yield _check_huge_pages(machine.transparent_huge_pages())
    yield _check_threads(torch.get_num_threads(), machine.cpu()["cores"], cgroup.cpu_quota())
    yield _check_openmp(machine.openmp_runtimes())
    yield _check_allocator(os.environ)
    yield _check_transformers()


def _check_huge_pages(setting: str | None) -> Finding:
    if setting == "never":
        remedy = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled; store() then moves weights there"
        text = "turned off: reading weights misses the TLB at each page of 4 KB"
        return Finding("huge pages", "slow", text, remedy)
    if setting is None:
        return Finding("huge pages", "absent", "this system does not say whether it has them")
    how = "for memory that asks: that of store() and of our layers" if setting == "madvise" else "for all memory"
    return Finding("huge pages", "ok", f"{setting}: {how}")


def _check_threads(threads: int, cores: int, quota: float | None) -> Finding:
    granted = cores if quota is None else min(cores, quota)
    limit = f" of which the control group grants {quota:g}" if quota is not None and quota < cores else ""
    text = f"torch uses {threads}; the process may run on {cores} cores{limit}"
    if threads > granted:
        remedy = f"torch.set_num_threads({max(int(granted), 1)}) or OMP_NUM_THREADS: more threads wait for each other"
        return Finding("threads", "slow", text, remedy)
    if threads < granted:
        return Finding("threads", "slow", text, f"torch.set_num_threads({int(granted)}) if the rest is free")
    return Finding("threads", "ok", text)


def _check_openmp(runtimes: list[str]) -> Finding:
    if len(runtimes) > 1:
        text = f"{len(runtimes)} are loaded: {', '.join(runtimes)}. Their threads compete for the same cores"
        return Finding("OpenMP runtimes", "slow", text, "import torch first, or remove the package that brings its own")
    return Finding("OpenMP runtimes", "ok", runtimes[0] if runtimes else "none found in this process")


def _check_allocator(environment: os._Environ[str] | dict[str, str]) -> Finding:
    preloaded = environment.get("LD_PRELOAD", "")
    if any(name in preloaded for name in ("jemalloc", "tcmalloc", "mimalloc")):
        return Finding("allocator", "ok", preloaded)
    if "MALLOC_TRIM_THRESHOLD_" in environment:
        return Finding("allocator", "ok", "glibc keeps the memory of large tensors")
    text = "glibc returns large tensors to the system, so torch's own faults pages anew at each training step"
    return Finding("allocator", "slow", text, f"only for training: start Python with {ALLOCATOR}")


def _check_transformers() -> Finding:
    version = installed_version("transformers")
    if version is None and not is_installed("transformers"):
        remedy = "pip install 'switchgear[transformers]' to run its models"
        return Finding("transformers", "absent", "not installed", remedy)
    version = version or "unknown version"
    try:
        importlib.import_module("switchgear.integrations.transformers")
    except Exception as error:  # a broken installation can raise anything
        return Finding("transformers", "broken", f"{version}: {first_line(error)}", _advise(version, error))
    return Finding("transformers", "ok", f'{version}: experts_implementation="switchgear" is registered')


def _advise(version: str, error: Exception) -> str:
    if is_too_old(version):
        return "pip install 'switchgear[transformers]'"
    if missing := missing_package(error):
        return f"install {missing}"
    return "pip install --force-reinstall transformers"
