# SPDX-License-Identifier: BSD-3-Clause
"""Errors of conversions of checkpoints. After any of them the target does not exist."""

from __future__ import annotations

from switchgear import files


class ConversionError(Exception):
    """A checkpoint could not be converted."""


class RecipeError(ConversionError, ValueError):
    """A recipe with an unknown operation or option, or one that the source cannot satisfy."""


class DamagedCheckpoint(ConversionError, ValueError):
    """A source with missing, truncated or changed files."""


class DiskFull(ConversionError, files.DiskFull):
    """No room for the result. Finished shards stay, and the conversion resumes."""
