# SPDX-License-Identifier: BSD-3-Clause
"""The one error of stores of experts."""

from __future__ import annotations


class StoreError(OSError):
    """A store of experts cannot be written, opened or read. The message names the file, and the expert if it is one."""
