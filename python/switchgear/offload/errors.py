# SPDX-License-Identifier: BSD-3-Clause
"""Errors of stores of experts."""

from __future__ import annotations

from switchgear.files import DiskFull


class StoreError(OSError):
    """A store of experts cannot be written, opened or read. The message names the file, and the expert if it is one."""


class StoreFull(StoreError, DiskFull):
    """There is no room for a store. Finished layers stay, and the same call continues with them."""
