# SPDX-License-Identifier: BSD-3-Clause
"""Where a cache has its rows: in host memory, or on a GPU of tests with streams that run in any order."""

from __future__ import annotations

import zlib

import pytest
from queued_device import QueuedDevice

from switchgear.offload import attach


@pytest.fixture(params=["host", "gpu"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "gpu":
        seed = zlib.crc32(request.node.name.encode())
        monkeypatch.setattr(attach, "find_device", lambda _: QueuedDevice(seed, is_eager=True))
    return str(request.param)
