# SPDX-License-Identifier: BSD-3-Clause
"""The demo's report folder: report.md, results.json, sample.txt and the plots; and its one-line verdict."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from switchgear.cli.common import write_file

from . import plots
from .text import report, sample

WARM_UP = 2  # first steps, excluded from the medians: they fault in the memory of gradients and optimizer states


def summarise(results: dict[str, Any], name: str) -> dict[str, float]:
    """Medians of one implementation, in milliseconds, tokens per second and bytes."""
    run, settings = results["implementations"][name], results["settings"]
    steps = run["steps"][WARM_UP:] or run["steps"]
    samples = run["generated"][1:]  # the first was the warm-up

    def middle(entries: list[dict[str, Any]], key: str) -> float:
        return 1e3 * float(median(entry[key] for entry in entries))

    parts = {key: middle(steps, key) for key in ("experts_forward", "experts_backward", "optimizer")}
    step = middle(steps, "seconds")
    generation = {key: middle(samples, key) for key in ("prefill", "prefill_experts", "decode", "decode_experts")}
    return {
        **parts,
        "step": step,
        "experts": parts["experts_forward"] + parts["experts_backward"],
        "other": max(0.0, step - sum(parts.values())),
        "tokens_per_second": settings["batch_size"] * settings["sequence_length"] / step * 1e3,
        **generation,
        "prefill_tokens_per_second": len(samples[0]["prompt"]) / generation["prefill"] * 1e3,
        "decode_tokens_per_second": 1e3 / generation["decode"],
        "peak_memory": run["peak_memory"] or 0,
        "held_out_loss": run["held_out_loss"],
    }


def verdict(results: dict[str, Any]) -> str:
    """One line: whether they agree, with the check that came closest to its bound."""
    checks = [(name, check) for name, run in results["implementations"].items() for check in run["checks"]]
    if not checks:
        return "nothing to compare: only one implementation ran"
    name, check = max(checks, key=lambda item: item[1]["difference"] / item[1]["bound"])
    return (
        f"{'AGREE' if results['agree'] else 'DISAGREE'}: the closest to its bound is {name}, {check['what']}: "
        f"{check['difference']:.1e} from {results['reference']}, allowed {check['bound']:.1e}, "
        f"rounding alone {check['noise']:.1e}"
    )


def write(results: dict[str, Any], folder: Path) -> None:
    """Writes all files of the report into `folder`, which is created if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = {name: summarise(results, name) for name in results["implementations"]}
    plots.losses(results, folder / "losses.png")
    plots.speed(summary, results, folder / "speed.png")
    plots.expert_load(results, folder / "expert_load.png")
    write_file("out", folder / "sample.txt", sample(results))
    write_file("out", folder / "report.md", report(results, summary, verdict(results), WARM_UP))
    text = json.dumps(results | {"summary": summary}, default=lambda data: data.decode("latin-1"))
    write_file("out", folder / "results.json", text + "\n")
