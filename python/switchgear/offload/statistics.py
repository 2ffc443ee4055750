# SPDX-License-Identifier: BSD-3-Clause
"""What a cache did: hits, misses, bytes, waits and prefetch, by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class LayerStatistics:
    """Counts of one layer since the start.

    Attributes:
        hits: uses of experts that were resident when their layer started. Prefetch makes no hits.
        misses: the other uses.
        bytes: read for misses: misses × record.
        wait_seconds: in which the layer waited for reads.
        predicted, used: of the experts that ran with prefetch, those that were predicted, and all.
        prefetched: misses whose reads a prediction had begun.
        wasted_bytes: read for predictions that were wrong.
    """

    name: str
    hits: int = 0
    misses: int = 0
    bytes: int = 0
    wait_seconds: float = 0.0
    predicted: int = 0
    used: int = 0
    prefetched: int = 0
    wasted_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Of the uses of experts; 0 if there are none."""
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def recall(self) -> float | None:
        """Of the experts that were used, the share that was predicted; None without predictions."""
        return self.predicted / self.used if self.used else None


@dataclass(frozen=True)
class Statistics:
    """Counts of a cache; its str is a table."""

    layers: tuple[LayerStatistics, ...]

    @property
    def hits(self) -> int:
        """Uses of experts that were in memory."""
        return sum(layer.hits for layer in self.layers)

    @property
    def misses(self) -> int:
        """Uses of experts that had to be read."""
        return sum(layer.misses for layer in self.layers)

    @property
    def hit_rate(self) -> float:
        """Of the uses of experts; 0 if there are none."""
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def bytes(self) -> int:
        """Bytes read, those of prefetches included."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def wait_seconds(self) -> float:
        """Seconds that layers waited for experts."""
        return sum(layer.wait_seconds for layer in self.layers)

    @property
    def recall(self) -> float | None:
        """Of the experts that were used, the share that was predicted; None without predictions."""
        used = sum(layer.used for layer in self.layers)
        return sum(layer.predicted for layer in self.layers) / used if used else None

    @property
    def wasted_bytes(self) -> int:
        """Bytes read for predictions that were wrong."""
        return sum(layer.wasted_bytes for layer in self.layers)

    def __str__(self) -> str:
        total = LayerStatistics("all")
        for layer in self.layers:
            for name, value in vars(layer).items():
                if name != "name":
                    setattr(total, name, getattr(total, name) + value)
        lines = [[column for column, _ in _COLUMNS]]
        lines += [[show(layer) for _, show in _COLUMNS] for layer in (*self.layers, total)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )


_COLUMNS: tuple[tuple[str, Callable[[LayerStatistics], str]], ...] = (
    ("layer", lambda layer: layer.name),
    ("hits", lambda layer: str(layer.hits)),
    ("misses", lambda layer: str(layer.misses)),
    ("hit rate", lambda layer: f"{layer.hit_rate:.1%}"),
    ("MB read", lambda layer: f"{layer.bytes / 1e6:.1f}"),
    ("s waited", lambda layer: f"{layer.wait_seconds:.3f}"),
    ("recall", lambda layer: "-" if layer.recall is None else f"{layer.recall:.1%}"),
    ("MB wasted", lambda layer: f"{layer.wasted_bytes / 1e6:.1f}"),
)
