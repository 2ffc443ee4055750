# SPDX-License-Identifier: BSD-3-Clause
"""Expert load where training is watched: TensorBoard, Weights & Biases, any function, and transformers' Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from switchgear.monitoring.load import LoadMeter
from switchgear.monitoring.sinks import Log, log_to

if TYPE_CHECKING:
    from switchgear.monitoring.callback import ExpertLoadCallback

__all__ = ["ExpertLoadCallback", "LoadMeter", "Log", "log_to"]


def __getattr__(name: str) -> Any:
    if name == "ExpertLoadCallback":  # imports transformers, so only on first use
        from switchgear.monitoring.callback import ExpertLoadCallback

        return ExpertLoadCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
