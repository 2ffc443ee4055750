# SPDX-License-Identifier: BSD-3-Clause
"""Every test with a `backend` argument runs on the reference and on the kernels of each instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, settings

import switchgear

ISAS = ("generic", "avx2", "avx512", "avx512bf16")

# Derandomised: a test that passes once passes always. The examples of a test may share the fixture that sets a backend.
settings.register_profile(
    "switchgear",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("switchgear")


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


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels in use: for what is promised of them and not of the reference, which sums as torch does."""
    with kernels_of(request.param):
        yield request.param


@pytest.fixture(params=["reference", *ISAS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend in use: "reference", or the instruction set of the kernels."""
    with switchgear.use_backend("reference") if request.param == "reference" else kernels_of(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _alike_on_every_machine() -> None:
    """One seed, and one thread: small tensors spend most of their time waiting for the others. Tests about threads set
    their number themselves."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
