# SPDX-License-Identifier: BSD-3-Clause
"""Every test with a `backend` argument runs on the reference, on the CPU kernels of each instruction set, and on the
CUDA kernels: on a device if there is one, and on the CPU if SWITCHGEAR_SIMT names a module that runs them."""

from __future__ import annotations

import os
import signal
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import skips
import switchgear
from backends_in_use import ISAS, SIMT_DEVICES, backend_named, kernels_of

ORDERS = ("forward", "reverse", "random:1")
TIME_LIMIT, TIME_LIMIT_SLOW = 300, 1800  # seconds for a test
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


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt. A shell ignores it in jobs that it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


PROCESSES = Path(__file__).parent / "parallel"


def _thin_products(items: list[pytest.Item]) -> None:
    """Marks a case as slow if each value of each of its parameters occurs in another case of its test.

    Of backends that users of this machine do not get, a sixth of the cases are enough, and at least six. A hash orders
    the cases: the choice is the same in all processes and differs between tests.
    """
    groups: dict[tuple[str, str | None], list[pytest.Item]] = {}
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and item.get_closest_marker("slow") is None:
            backend = callspec.params.get("backend", callspec.params.get("isa"))
            groups.setdefault((item.nodeid.partition("[")[0], backend), []).append(item)
    for (_, backend), cases in groups.items():
        is_main = backend in (None, "cuda", switchgear.cpu_isa(), *SIMT_DEVICES)
        most = len(cases) if is_main else 6 + len(cases) // 6
        if some := cases[0].get_closest_marker("some"):
            most = min(most, some.args[0])
        seen: set[tuple[str, int]] = set()
        for item in sorted(cases, key=lambda item: zlib.crc32(item.nodeid.encode())):
            new = set(item.callspec.indices.items()) - seen
            if new and most > 0:
                seen |= new
                most -= 1
            else:
                item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of processes share a pool of them, so pytest-xdist runs them in one process. On simt, each thread order in
    SIMT_TURNS (default: all orders that run) runs its share of the tests marked `in_turns`. `on` names the devices that
    these tests need."""
    for item in items:
        if PROCESSES in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("processes"))
    _thin_products(items)
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


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Releases of transformers before 5.24, such as the last one for Python 3.10, lack some model types."""
    callspec, transformers = getattr(item, "callspec", None), sys.modules.get("transformers")
    model_type = callspec and callspec.params.get("model_type")
    if transformers is None or not model_type or model_type in transformers.CONFIG_MAPPING:
        return
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
        pytest.skip(f"this transformers has no {model_type}")


# ---- no test hangs or is skipped unnoticed ---------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fails a test that takes too long. If it hangs in native code, `faulthandler_timeout` shows where."""
    limit = TIME_LIMIT_SLOW if item.get_closest_marker("slow") else TIME_LIMIT

    def stop(*_: object) -> None:
        pytest.fail(f"takes more than {limit} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


_unknown: set[str] = set()


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        if not skips.is_allowed(reason):
            _unknown.add(f"{report.nodeid}: {reason}")


pytest_runtest_logreport = pytest_collectreport = _note


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unknown and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _unknown:
        terminalreporter.section("skipped for reasons that are not in tests/skips.py", red=True)
        for line in sorted(_unknown):
            terminalreporter.line(line)
