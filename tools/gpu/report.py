# SPDX-License-Identifier: BSD-3-Clause
"""A readable report of a folder of results, of a whole run or of one that was cut off: report.md in the folder.

report.py DIR [--docs FILE]      --docs: also the tables of benchmarks, for docs/ and bench/results
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import sweep
from gpu.folder import Folder, Row
from gpu.folder import write as write_file
from gpu.watch import GOOD

ORDER = (
    *("machine", "build", "conformance", "smoke", "replay", "first-bench"),
    *("tests", "sweep", "ncu", "bench", "sanitizer"),
)


def steps_of(folder: Folder) -> list[str]:
    """Steps with results, in the order of a run."""
    found = {path.name for path in folder.path.iterdir() if path.is_dir() and any(path.glob("*.json"))}
    return [name for name in ORDER if name in found]


def _meta(folder: Folder, step: str) -> dict[str, Any]:
    found = folder.values(f"steps/{step}")
    return found if isinstance(found, dict) else {}


def failures(folder: Folder) -> list[Row]:
    """What makes a run fail: not what was left out or skipped, nor anything in a step without consequences."""
    bad = [*GOOD, "left out"]
    return [row for step in steps_of(folder) if not _meta(folder, step).get("harmless")
            for row in folder.rows(step) if row["verdict"] not in bad]  # fmt: skip


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |\n" for line in lines)


def summary(folder: Folder) -> str:
    """A line per step."""
    rows = []
    for step in steps_of(folder):
        counts = Counter(str(row["verdict"]) for row in folder.rows(step))
        seconds = _meta(folder, step).get("seconds", "cut off")
        rows.append((step, seconds, ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())))
    return table(("step", "seconds", "cases"), rows)


def bench_files(folder: Folder) -> list[dict[str, Any]]:
    found = []
    for path in sorted((folder.path / "bench").glob("*.json")):
        try:
            found.append(json.loads(path.read_text()))
        except ValueError:
            continue
    return found


def bench_table(folder: Folder) -> str:
    def cell(value: object, form: str) -> str:
        return format(value, form) if isinstance(value, (int, float)) else ""

    layers, ops = [], []
    for results in bench_files(folder):
        for row in results.get("results", []):
            layers.append((
                row["shape"], row["tokens"], row["mode"], row["competitor"],
                "wrong" if row.get("wrong") else cell(row.get("ms"), ".3f"), cell(row.get("tflops"), ".0f"),
                cell(row.get("percent_of_ceiling"), ".0f"), row.get("bound", ""),
            ))  # fmt: skip
        for row in results.get("ops", []):
            ops.append((row["op"], row["case"], row["competitor"], cell(row["us"], ".1f"), cell(row["tflops"], ".0f"),
                        cell(row["gbytes_per_s"], ".0f")))  # fmt: skip
    text = ""
    if layers:
        header = ("shape", "tokens", "mode", "competitor", "ms", "TFLOP/s", "% of ceiling", "bound")
        text += table(header, layers)
    if ops:
        text += "\n" + table(("op", "case", "competitor", "us", "TFLOP/s", "GB/s"), ops)
    return text


LEAST_GAIN = 1.02  # below it a variant is noise


def sweep_rows(folder: Folder) -> list[Row]:
    """A row per variant and case that was timed."""
    return [row for row in folder.rows("sweep") if row["verdict"] == "passed" and "ms" in row]


def sweep_table(folder: Folder) -> str:
    """For each case: the kernels as they are, the best variant, and variants whose outputs have other bits."""
    rows = sweep_rows(folder)
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = {row["job"]: row for row in rows if row["case"] == case}
        now = of_case.get("as-is")
        best = min(of_case.values(), key=lambda row: float(row["ms"]))
        other = [name for name, row in of_case.items() if now is not None and row.get("sum") != now.get("sum")]
        gain = now["ms"] / best["ms"] if now is not None else 1.0
        better = f"{best['job']}: {best['ms']:.3f} ({gain:.2f}x)" if gain >= LEAST_GAIN else "none"
        current = f"{now['ms']:.3f}" if now is not None else ""
        lines.append((case, current, f"{now['tflops']:.0f}" if now is not None else "", better, ", ".join(other)))
    return table(("case", "ms", "TFLOP/s", "better", "other bits"), lines) if lines else ""


def new_tunables(folder: Folder) -> list[str]:
    """Variants that are faster over all cases, by geometric mean, and that slow none: lines for the tables of tiles."""
    rows = sweep_rows(folder)
    lines = {variant.name: f"`{variant.after}` for `{variant.before}`" for variant in sweep.variants()}
    times = {(row["job"], row["case"]): float(row["ms"]) for row in rows}
    found = []
    for name in dict.fromkeys(row["job"] for row in rows if row["job"] != "as-is"):
        gains = [
            times["as-is", case] / ms for (job, case), ms in times.items() if job == name and ("as-is", case) in times
        ]
        mean = math.prod(gains) ** (1 / len(gains)) if gains else 0.0
        if mean >= LEAST_GAIN and min(gains) > 1 / LEAST_GAIN:
            found.append(f"{lines.get(name, name)}: {mean:.3f}x over {len(gains)} cases")
    return found


def left_out_of_benches(folder: Folder) -> list[str]:
    return [f"{entry['case']}, {entry['competitor']}: {entry['reason']}"
            for results in bench_files(folder) for entry in results.get("skipped", [])]  # fmt: skip


def text_of(folder: Folder) -> str:
    parts = [f"# Run on a GPU\n\n{summary(folder)}"]
    sections = (
        ("Failures", ("failed", "hang", "fault", "time", "missing", "running")), ("Findings", ("finding",)),
        ("Left out", ("left out",)),
    )  # fmt: skip
    for title, verdicts in sections:
        rows = [row for step in steps_of(folder) for row in folder.rows(step) if row["verdict"] in verdicts]
        if rows:
            columns = ("step", "job", "case", "verdict", "detail")
            cells = [[row.get(column, "") for column in columns] for row in rows]
            parts.append(f"## {title}\n\n{table(columns, cells)}")
    if benches := bench_table(folder):
        parts.append(f"## Benchmarks\n\n{benches}")
    if tunables := sweep_table(folder):
        parts.append(f"## Tunables\n\n{tunables}" + "".join(f"- new row: {line}\n" for line in new_tunables(folder)))
    if left := left_out_of_benches(folder):
        parts.append("## Left out of benchmarks\n\n" + "".join(f"- {line}\n" for line in left))
    return "\n".join(parts)


def write(folder: Folder) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    (folder.path / "report.md").write_text(text_of(folder))
    write_file(folder.path / "run.json", {
        "steps": [{"step": step, **_meta(folder, step)} for step in steps_of(folder)],
        "failures": failures(folder),
    })  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="write the tables of benchmarks to this file")
    args = parser.parse_args(arguments)
    if not args.folder.is_dir():
        raise SystemExit(f"{args.folder}: no such folder")
    folder = Folder(args.folder)
    write(folder)
    if args.docs is not None:
        args.docs.write_text(bench_table(folder))
    print(text_of(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
