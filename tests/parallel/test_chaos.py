# SPDX-License-Identifier: BSD-3-Clause
"""Random faults while four processes train, and while they join again: see chaos.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import Options, Run, check, run
from test_soak import Resources

STEPS, FAULTS = 10_000, 50


def go(options: Options, folder: Path) -> Run:
    seen = run(options, str(folder), verbose=True)
    print(check(seen))
    return seen


@pytest.mark.parametrize("transport", ["gloo", "shared_memory"])
@pytest.mark.some(1)
def test_a_few_faults(tmp_path: Path, transport: str) -> None:
    go(Options(trials=3, seed=1, transport=transport), tmp_path)


@pytest.mark.slow  # three minutes each
@pytest.mark.parametrize("transport", ["gloo", "shared_memory"])
def test_a_hundred_faults(tmp_path: Path, transport: str) -> None:
    go(Options(transport=transport), tmp_path)


def check_growth(seen: Run, bytes_allowed: int) -> None:
    """Of the process that was never disturbed, while it has four ranks."""
    entries = [entry for entry in seen.logs.entries[0] if "resources" in entry and entry["ranks"] == 4]
    found = [Resources(*entry["resources"]) for entry in entries]
    first, last = found[len(found) // 4], found[-1]
    print(entries[-1]["step"], first, last, sep="\n")
    assert last.private_bytes - first.private_bytes < bytes_allowed
    assert last.files - first.files <= 2
    assert last.threads - first.threads <= 1  # one may look for processes that want to join
    assert last.names == 0


@pytest.mark.slow
def test_nothing_grows_with_some_faults(tmp_path: Path) -> None:
    options = Options(trials=4, spare=True, transport="gloo", resources_every=10, timeout=5.0)
    check_growth(go(options, tmp_path), bytes_allowed=2**22)


@pytest.mark.slow  # eight minutes each
@pytest.mark.parametrize("transport", ["gloo", "shared_memory"])
def test_nothing_grows_with_fifty_faults(tmp_path: Path, transport: str) -> None:
    options = Options(
        FAULTS, 2, transport, num_layers=1, spare=True, steps_between=STEPS // FAULTS, pause=0.0, timeout=2.0
    )
    seen = go(options, tmp_path)
    assert seen.logs.entries[0][-1]["step"] >= STEPS
    check_growth(seen, bytes_allowed=2**21)
