# SPDX-License-Identifier: BSD-3-Clause
"""Every test with a `backend` argument runs on the reference, on the CPU kernels of each instruction set, and on the
CUDA kernels: on a device if there is one, and on the CPU if SWITCHGEAR_SIMT names a module that runs them."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from backends_in_use import ISAS, SIMT_DEVICES, backend_named, kernels_of

ORDERS = ("forward", "reverse", "random:1")
CUDA = ["cuda"] if torch.cuda.is_available() else []

# Derandomised: a test that passes once always passes. The examples of a test may share the fixture that sets a backend.
settings.register_profile(
    "switchgear",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("switchgear")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels in use, for guarantees that the reference does not give, since it sums as torch does."""
    with kernels_of(request.param):
        yield request.param


@pytest.fixture(params=["reference", *ISAS, *SIMT_DEVICES, *CUDA])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend in use: "reference", the instruction set of the kernels, "simt…" or "cuda"."""
    if request.param == "cuda" and request.node.get_closest_marker("checks_values"):
        pytest.skip("values in device memory are not checked")
    with backend_named(request.param):
        yield request.param


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On simt, each thread order in SIMT_TURNS (default: all orders that run) runs its share of the tests marked
    `in_turns`. `on` names the devices that these tests need."""
    order = os.environ.get("SWITCHGEAR_SIMT_ORDER")
    turns = os.environ.get("SIMT_TURNS", "").split() or os.environ.get("SIMT_ORDERS", "").split() or ORDERS
    if order not in turns:
        return

    def has_its_turn(item: pytest.Item) -> bool:
        name = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        marker = item.get_closest_marker("in_turns")
        if name not in SIMT_DEVICES or marker is None:
            return True
        is_needed = name in marker.kwargs.get("on", SIMT_DEVICES)
        return is_needed and zlib.crc32(item.name.encode()) % len(turns) == turns.index(order)

    others = [item for item in items if not has_its_turn(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if has_its_turn(item)]


@pytest.fixture(autouse=True)
def _alike_on_every_machine() -> None:
    """One seed, and one thread: with small tensors, threads mostly wait for each other. Tests about threads set their
    own number."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
