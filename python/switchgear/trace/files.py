# SPDX-License-Identifier: BSD-3-Clause
"""Files of recordings of routers: dicts written with torch.save, with the number of their format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from switchgear.files import AnyPath
from switchgear.utils.packages import first_line

_Recording = TypeVar("_Recording")


def load_recording(
    path: AnyPath, kind: str, file_format: int, of_data: Callable[[dict[str, Any]], _Recording]
) -> _Recording:
    """of_data(the dict in the file). ValueError, which names the class `kind`, for any other file."""
    with open(path, "rb") as file:
        try:
            data = torch.load(file, weights_only=True)
            if not isinstance(data, dict) or data["format"] != file_format:
                raise ValueError("another format")
            return of_data(data)
        except Exception as error:  # torch.load raises many kinds for files of others
            reason = first_line(error)
            raise ValueError(f"path: expected a file of {kind}.save, got {path} ({reason})") from error
