# SPDX-License-Identifier: BSD-3-Clause
"""A plugin of pytest that prints lines.py's lines: `pytest -p gpu.one_by_one`. `--from N` leaves out earlier tests.

A test that waits for a device forever cannot be ended from inside Python: watch.py ends the process, and starts it
again after that test.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from gpu.lines import say

# A GPU has to confirm what the model of its instructions assumes; if it does not, that is worth knowing, but no fault.
ASSUMED = ("does_not_depend_on_its_batch",)  # operands swapped or not, wgmma adds in one order


OUTPUT = os.dup(1)  # before pytest captures it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--from", type=int, default=0, dest="first_test", metavar="N", help="leave out the tests before N")


class Lines:
    def __init__(self, first: int) -> None:
        self.first, self.numbers, self.failure, self.skipped = first, {}, "", False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        say(OUTPUT, cases=[item.nodeid for item in items])
        self.numbers = {item.nodeid: number for number, item in enumerate(items)}
        config.hook.pytest_deselected(items=items[: self.first])
        items[:] = items[self.first :]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.failure, self.skipped = "", False
        say(OUTPUT, starts=self.numbers[item.nodeid])
        result = yield
        verdict = "failed" if self.failure else "skipped" if self.skipped else "passed"
        if self.failure and any(name in item.name for name in ASSUMED):
            verdict = "finding"
        say(OUTPUT, ends=self.numbers[item.nodeid], verdict=verdict, detail=self.failure)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
            self.failure = self.failure or f"{report.when}: {' '.join(lines[:2]) or report.longreprtext[-200:]}"[:500]
        self.skipped = self.skipped or report.skipped


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Lines(config.getoption("first_test")), "one-by-one")
