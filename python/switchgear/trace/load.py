# SPDX-License-Identifier: BSD-3-Clause
"""The load of a trace's experts since the last reading, as few named numbers, and where they are written: TensorBoard,
Weights & Biases, or a function.

A model of 61 layers with 256 experts has 15,616 loads. Each reading is instead five statistics: their mean and worst
value over the layers, and the values of some layers at equal distances. The keys stay the same from reading to reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from switchgear.checks import Count, Size, checked

if TYPE_CHECKING:
    from switchgear.trace import LayerTrace, RoutingTrace

Write = Callable[[Mapping[str, float], "int | None"], object]
# The worst value over the layers is the largest or the smallest one.
STATISTICS = {"max_violation": max, "load_entropy": min, "router_entropy": min, "unused": max, "dropped": max}


class LoadMeter:
    """Readings of a trace.

    Args:
        trace: a RoutingTrace; it may be recording.
        max_layers: at most this many layers have keys of their own; 0 for the statistics over all layers alone.
        prefix: of the keys.

    A reading has at most 5 · (2 + max_layers) keys, such as "moe/max_violation/mean", "moe/max_violation/worst" and
    "moe/max_violation/model.layers.3.mlp":
        max_violation: max load / mean load - 1; 0 is balanced.
        load_entropy: of the load, divided by log E; 1 is balanced.
        router_entropy: mean entropy of the router's softmax, divided by log E. Absent where it is not recorded.
        unused: experts without a token, as a fraction.
        dropped: choices dropped by a capacity limit, as a fraction.
    """

    @checked
    def __init__(self, trace: RoutingTrace, *, max_layers: Count = 8, prefix: str = "moe") -> None:
        if not hasattr(trace, "layers"):
            raise TypeError(f"trace: expected RoutingTrace, got {type(trace).__name__}")
        self.trace, self.max_layers, self.prefix = trace, max_layers, prefix
        self._before: dict[str, tuple[LayerTrace, Tensor]] = {}
        self._named: list[str] = []

    def read(self) -> dict[str, float]:
        """The statistics of what was recorded since the last reading; empty if nothing was."""
        rows: dict[str, dict[str, float]] = {}
        for name, layer in self.trace.layers.items():
            sums = _sums(layer)
            earlier, before = self._before.get(name, (None, sums))
            self._before[name] = (layer, sums)
            if earlier is not layer:  # a new layer, or the trace was reset
                before = torch.zeros_like(sums)
            if (row := _statistics(sums - before)) is not None:
                rows[name] = row
        result: dict[str, float] = {}
        for statistic, worst in STATISTICS.items():
            values = [row[statistic] for row in rows.values() if not math.isnan(row[statistic])]
            if values:
                result[f"{self.prefix}/{statistic}/mean"] = sum(values) / len(values)
                result[f"{self.prefix}/{statistic}/worst"] = worst(values)
        for name in self._with_keys(list(rows)):
            for statistic, value in rows.get(name, {}).items():
                if not math.isnan(value):
                    result[f"{self.prefix}/{statistic}/{name}"] = value
        return result

    @contextmanager
    def reading(self) -> Iterator[dict[str, float]]:
        """The same, for a block that writes it. If the block raises, the next reading has these steps again."""
        before = dict(self._before)
        try:
            yield self.read()
        except BaseException:
            self._before = before
            raise

    def _with_keys(self, names: list[str]) -> list[str]:
        """The layers that have keys of their own, chosen once: the first, the last and those between."""
        if not self._named:
            last, count = len(names) - 1, min(self.max_layers, len(names))
            self._named = [names[round(i * last / max(count - 1, 1))] for i in range(count)]
        return self._named


def _sums(layer: LayerTrace) -> Tensor:
    """[3 + E] float64 on the CPU: tokens, entropy, dropped choices, load. One copy per layer."""
    dropped = layer.num_dropped.double()
    entropy = torch.full_like(dropped, torch.nan) if layer.entropy is None else layer.entropy.double()
    heads = torch.stack([entropy, dropped])
    read = torch.cat([heads, layer.tokens_per_expert.double()]).cpu()
    return torch.cat([torch.tensor([float(layer.num_tokens)], dtype=torch.float64), read])


def _statistics(sums: Tensor) -> dict[str, float] | None:
    tokens, entropy, dropped = sums[:3].tolist()
    load = sums[3:]
    total = float(load.sum())
    if not total:
        return None
    log_experts = math.log(max(len(load), 2))
    return {
        "max_violation": float(load.max() / load.mean()) - 1,
        "load_entropy": float(torch.special.entr(load / total).sum()) / log_experts,
        "router_entropy": entropy / max(tokens, 1.0) / log_experts,
        "unused": float((load == 0).double().mean()),
        "dropped": dropped / (total + dropped),
    }


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

    @checked
    def __init__(self, meter: LoadMeter, writer: Any, every: Size = 1) -> None:
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
