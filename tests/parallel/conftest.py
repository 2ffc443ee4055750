# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

from collections.abc import Iterator

import pytest
from parallel_pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four ranks, shared by all tests that leave them alive."""
    pool = Pool(4)
    yield pool
    pool.close()
