# SPDX-License-Identifier: BSD-3-Clause
"""Errors by type and argument: what a message says beside the argument is free."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def raises(
    error: type[BaseException] | tuple[type[BaseException], ...], argument: str = ""
) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """As pytest.raises; the message must contain `argument`, if there is one, as a word."""
    with pytest.raises(error) as caught:
        yield caught
    message = str(caught.value)
    del caught  # the traceback has this frame: as a cycle, they would keep what all frames hold, such as graphs
    found = re.search(rf"(?<![^\W_]){re.escape(argument)}(?!\w)", message)
    assert found or not argument, f"expected {argument} in {message!r}"
