# SPDX-License-Identifier: BSD-3-Clause
"""Expert load where training is watched: TensorBoard, Weights & Biases, any function, and transformers' Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from switchgear.utils.packages import find_moved

if TYPE_CHECKING:
    from switchgear.trace.callback import ExpertLoadCallback
    from switchgear.trace.load import LoadMeter, Log, log_to

__all__ = ["ExpertLoadCallback", "LoadMeter", "Log", "log_to"]

MOVED = {
    "ExpertLoadCallback": "switchgear.trace.callback",  # imports transformers
    "LoadMeter": "switchgear.trace.load",
    "Log": "switchgear.trace.load",
    "log_to": "switchgear.trace.load",
}
if not TYPE_CHECKING:
    __getattr__ = find_moved(__name__, MOVED)
