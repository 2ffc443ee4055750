# SPDX-License-Identifier: BSD-3-Clause
"""Every test with a `backend` argument runs on the reference and on the kernels of each instruction set."""

from __future__ import annotations

from collections.abc import Iterator

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


@pytest.fixture(params=["reference", *ISAS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend in use: "reference", or the instruction set of the kernels."""
    if request.param == "reference":
        with switchgear.use_backend("reference"):
            yield "reference"
        return
    available = switchgear.available_cpu_isas()
    if request.param not in available:
        pytest.skip(f"no {request.param} kernels: this build on this processor has {', '.join(available)}")
    before = switchgear.cpu_isa()
    switchgear.set_cpu_isa(request.param)
    with switchgear.use_backend("native"):
        yield request.param
    switchgear.set_cpu_isa(before)


@pytest.fixture(autouse=True)
def _alike_on_every_machine() -> None:
    """One seed; and one thread, since small tensors spend most of their time waiting for the others. Tests that are about
    threads set their number themselves."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
