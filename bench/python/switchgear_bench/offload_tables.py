# SPDX-License-Identifier: BSD-3-Clause
"""Tables of `switchgear bench offload`. A cell is the median of the runs."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

from switchgear.cli.common import markdown_table

from .report import Blocks, section, threads
from .results import Row

OFFLOAD, PREFETCH, REPLAY, FITS = "offload", "prefetch", "replay", "all fits"
ORDER = ("resident", OFFLOAD, PREFETCH, "mmap", "accelerate", "llama.cpp")
WORDS = {
    "resident": "resident, no limit",
    OFFLOAD: "**switchgear**, LRU",
    PREFETCH: "**switchgear**, LRU and prefetch",
    "mmap": "switchgear's kernels on mapped files",
    "accelerate": "accelerate, disk offload",
    "llama.cpp": "llama.cpp, mapped GGUF",
}
# what is compared with the faster of our two runs: at least so many times slower
TARGETS = {"accelerate": 5.0, "mmap": 1.2}
MOST_SLOWER, LEAST_OF_REPLAY = 1.03, 0.85


def blocks(results: dict[str, Any]) -> Blocks:
    return {"offload": partial(whole, results)}


def whole(results: dict[str, Any]) -> str:
    return section(note(results), table(results), verdicts(results))


def text(results: dict[str, Any]) -> str:
    lines = [table(results), *verdicts(results)]
    lines += [f"{entry['runner']}: {entry['reason']}" for entry in results["skipped"]]
    return "\n".join(lines)


def line(row: Row) -> str:
    """A run, while others are still to come."""
    rate = f"{row['tokens'] / row['seconds']:.2f} tokens/s"
    return f"{row['runner']}: {rate}{', WRONG' if row['wrong'] else ''}"


def note(results: dict[str, Any]) -> str:
    about, model = results["machine"], results["model"]
    limit = results["limit"]
    memory = f"a control group of {limit >> 20} MiB" if limit else "no limit: none could be set here"
    ahead = results.get("read_ahead")
    mapped = f" Linux reads {ahead >> 10:,} KiB ahead on it, for mapped files." if ahead else ""
    rates = ", ".join(f"{rate / 1e9:.2f}" for rate in (min(results["disk_rates"]), max(results["disk_rates"])))
    return (
        f"{model['num_layers']} layers of {model['num_experts']} experts, top {model['top_k']}, hidden size "
        f"{model['hidden_size']}, intermediate size {model['intermediate_size']}, bfloat16: "
        f"{model['expert_bytes'] / 2**30:.2f} GiB of experts, {_record(model) / 2**20:.0f} MiB each, in {memory}. "
        f"Routing is as local as in the model of `train-tiny`. The disk gives {rates} GB/s (lowest, highest) of such "
        f"records with O_DIRECT.{mapped} {about['model']}, {threads(about['threads'])}, {about['isa']}; torch "
        f"{about['torch']}, transformers {about['transformers']}, switchgear {about['switchgear']}.\n"
    )


def _record(model: dict[str, Any]) -> int:
    return int(model["expert_bytes"] // (model["num_layers"] * model["num_experts"]))


def table(results: dict[str, Any]) -> str:
    """A row per runner."""
    header = ["experts", "tokens/s", "runs", "read, MB/token", "hits", "waited, ms/token", "tokens, logits as resident"]
    lines = []
    for name in ORDER:
        if not (rows := _rows(results, name)):
            continue
        same = [all(row[key] for row in rows) for key in ("same_tokens", "same_logits")]
        lines.append([
            WORDS[name], f"{speed(rows):.2f}", str(len(rows)), f"{_per_token(rows, 'read_bytes') / 1e6:.0f}",
            _hits(rows), f"{1e3 * _per_token(rows, 'waited_seconds'):.0f}" if "waited_seconds" in rows[0] else "",
            ", ".join("equal" if each else "differ" for each in same),
        ])  # fmt: skip
    return markdown_table(header, lines, left=(0, 6))


def verdicts(results: dict[str, Any]) -> list[str]:
    """The targets, and what was reached."""
    ours = max(
        (name for name in (OFFLOAD, PREFETCH) if _rows(results, name)),
        key=lambda n: speed(_rows(results, n)),
        default="",
    )
    lines = []
    if ours:
        mine = _rows(results, ours)
        for name, least in TARGETS.items():
            if rows := _rows(results, name):
                ratio = speed(mine) / speed(rows)
                lines.append(f"{ratio:.1f}x {WORDS[name]} (at least {least:g}x: {_word(ratio >= least)})")
        if rows := _rows(results, "llama.cpp"):
            lines.append(f"{speed(mine) / speed(rows):.1f}x {WORDS['llama.cpp']}")
    if rows := _rows(results, FITS):
        ratio = median(row["offloaded_ms"] / row["resident_ms"] for row in rows)
        lines.append(
            f"with a slot for each expert, {100 * (ratio - 1):+.1f} % time of the resident model (at most "
            f"{100 * (MOST_SLOWER - 1):.0f} %: {_word(ratio <= MOST_SLOWER)})"
        )
    if rows := [row for row in _rows(results, REPLAY) if row["busy_seconds"] and row["replayed_seconds"]]:
        rates = [
            (row["loaded_bytes"] / row["busy_seconds"], row["replayed_bytes"] / row["replayed_seconds"]) for row in rows
        ]
        share = median(own / replayed for own, replayed in rates)
        lines.append(
            f"while it reads, the cache reads {median(own for own, _ in rates) / 1e9:.2f} GB/s, {100 * share:.0f} % of "
            f"what a plain loop reads that repeats these reads token by token (at least {100 * LEAST_OF_REPLAY:.0f} %: "
            f"{_word(share >= LEAST_OF_REPLAY)})"
        )
    return lines + _waits(results)


def _waits(results: dict[str, Any]) -> list[str]:
    rows = [_rows(results, name) for name in (OFFLOAD, PREFETCH)]
    if not all(rows):
        return []
    waits = [1e3 * _per_token(each, "waited_seconds") for each in rows]
    return [f"{waits[0]:.0f} ms of waiting per token without prefetch, {waits[1]:.0f} ms with it"]


def speed(rows: list[Row]) -> float:
    """Tokens per second."""
    return float(median(row["tokens"] / row["seconds"] for row in rows))


def _rows(results: dict[str, Any], name: str) -> list[Row]:
    return [row for row in results["results"] if row["runner"] == name]


def _per_token(rows: list[Row], key: str) -> float:
    return float(median(row[key] / row["tokens"] for row in rows))


def _hits(rows: list[Row]) -> str:
    if "hits" not in rows[0]:
        return ""
    return f"{100 * median(row['hits'] / (row['hits'] + row['misses']) for row in rows):.0f} %"


def _word(holds: bool) -> str:
    return "yes" if holds else "**no**"
