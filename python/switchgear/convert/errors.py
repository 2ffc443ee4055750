# SPDX-License-Identifier: BSD-3-Clause
"""Errors of conversions of checkpoints. After any of them the target does not exist."""

from __future__ import annotations


class ConversionError(Exception):
    """A checkpoint could not be converted."""


class RecipeError(ConversionError, ValueError):
    """A recipe with an unknown operation or option, or one that the source cannot satisfy."""


class DamagedCheckpoint(ConversionError, ValueError):
    """A source with missing, truncated or changed files."""


class DiskFull(ConversionError, OSError):
    """No room for the result. Finished shards stay, and the conversion resumes."""

    def __str__(self) -> str:
        return str(self.strerror)  # OSError would begin with a number
