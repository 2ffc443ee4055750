# SPDX-License-Identifier: BSD-3-Clause
"""Draw the log of `train_parallel.py --chaos`: which ranks took which steps, what was done to them, and the loss.

torchrun --standalone --nproc-per-node 4 examples/train_parallel.py --steps 1500 --chaos LOG
python examples/plot_chaos.py LOG chaos.png                                     needs matplotlib
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

MARKS = {"kill": ("x", "killed"), "stop": ("|", "stopped")}


def read(folder: str | Path) -> dict[int, list[dict[str, Any]]]:
    """The entries of each rank, in order. A killed process may leave half a line."""
    entries: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(Path(folder).glob("*.log")):
        entries[int(path.stem)] = []
        for line in path.read_text().splitlines():
            try:
                entries[int(path.stem)].append(json.loads(line))
            except ValueError:
                continue
    return entries


def main(folder: str | Path, target: str | Path) -> None:
    from matplotlib.figure import Figure

    ranks = read(folder)
    start = min(entry["time"] for entries in ranks.values() for entry in entries if "step" in entry)
    figure = Figure(figsize=(9, 4.2), layout="constrained", dpi=100)
    lanes, curve = figure.subplots(2, 1, sharex=True, height_ratios=(len(ranks), 3))
    losses: dict[int, tuple[float, list[float]]] = {}
    for rank, entries in ranks.items():
        times = [entry["time"] - start for entry in entries if "step" in entry]
        lanes.plot(times, [rank] * len(times), "|", color="C0", markersize=9, markeredgewidth=0.6)
        for fault, (mark, name) in MARKS.items():
            found = [entry["time"] - start for entry in entries if entry.get("fault") == fault]
            lanes.plot(found, [rank + 0.38] * len(found), mark, color="C3" if fault == "kill" else "C1", markersize=8,
                       markeredgewidth=2, label=name if rank == 0 else None)  # fmt: skip
        for entry in entries:
            if "step" in entry:
                losses.setdefault(entry["step"], (entry["time"] - start, []))[1].append(entry["error"])
    lanes.set_yticks(list(ranks), [f"rank {rank}" for rank in ranks])
    lanes.set_ylim(-0.5, len(ranks) - 0.3)
    lanes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=9, frameon=False)
    lanes.set_title("a tick per applied step of the optimizer", fontsize=9, loc="left")
    shown = sorted(losses.values())
    curve.plot([time for time, _ in shown], [sum(values) / len(values) for _, values in shown], linewidth=0.8)
    curve.set_yscale("log")
    curve.set_ylabel("loss")
    curve.set_xlabel("seconds")
    figure.savefig(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("target")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.target)
