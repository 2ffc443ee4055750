# SPDX-License-Identifier: BSD-3-Clause
"""Writes the readings of a trace to TensorBoard, to Weights & Biases, or to a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from switchgear.reference import check_size
from switchgear.trace.load import LoadMeter

if TYPE_CHECKING:
    from switchgear.trace import RoutingTrace

Write = Callable[[Mapping[str, float], "int | None"], object]


def write_of(writer: Any) -> Write:
    """How to write to `writer`: an object with add_scalar (TensorBoard's SummaryWriter), with log (a run of wandb, or
    wandb itself), or a function of (metrics, step). TypeError for anything else."""
    if callable(getattr(writer, "add_scalar", None)):

        def add_scalars(metrics: Mapping[str, float], step: int | None) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)

        return add_scalars
    if callable(getattr(writer, "log", None)):
        return lambda metrics, step: writer.log(dict(metrics), step=step)
    if callable(writer):
        return lambda metrics, step: writer(metrics, step)
    raise TypeError(
        "writer: expected an object with add_scalar (TensorBoard), with log (wandb), or a function of (metrics, step); "
        f"got {type(writer).__name__}"
    )


class Log:
    """Call it after each step; it writes what was recorded since it last wrote.

    Args:
        every: writes only at every n-th call. Reading a trace waits for its device, once per layer.
    """

    def __init__(self, meter: LoadMeter, writer: Any, every: int = 1) -> None:
        check_size("every", every)
        self._meter, self._write, self._every, self._calls = meter, write_of(writer), every, 0

    def __call__(self, step: int | None = None) -> dict[str, float]:
        """Writes and returns the reading; empty where nothing is due or nothing was recorded. What could not be written
        is in the next one."""
        self._calls += 1
        if self._calls % self._every:
            return {}
        with self._meter.reading() as metrics:
            if metrics:
                self._write(metrics, step)
        return metrics


def log_to(trace: RoutingTrace, writer: Any, *, every: int = 1, max_layers: int = 8, prefix: str = "moe") -> Log:
    """A Log of the trace to `writer` (see write_of), with the keys of LoadMeter.

    with RoutingTrace(model) as trace:
        log = log_to(trace, SummaryWriter())
        for step, batch in enumerate(batches):
            train(model, batch)
            log(step)
    """
    return Log(LoadMeter(trace, max_layers=max_layers, prefix=prefix), writer, every)
