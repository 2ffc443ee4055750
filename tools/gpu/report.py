# SPDX-License-Identifier: BSD-3-Clause
"""The results of a run, and a readable report of them, also of a run that was cut off: report.py DIR writes
DIR/report.md."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import sweep
from gpu.watch import GOOD, Row

LEAST_GAIN = 1.02  # below it a variant is noise


class Results:
    """A folder with a line of results.jsonl for each case when it starts and when it ends, for the begin and the end of
    each step, and with logs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **line: object) -> None:
        """Begins a line, however the last one ended."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "results.jsonl", "a") as file:
            file.write(f"\n{json.dumps(line, default=str)}")

    def steps(self) -> dict[str, Row]:
        """Steps in their order: `rows` by job and case, `seconds` if it has ended, whether it is `harmless`. What an
        earlier run of a step found does not count."""
        steps: dict[str, Row] = {}
        path = self.path / "results.jsonl"
        for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if "begins" in line:
                steps.pop(line["begins"], None)
                steps[line["begins"]] = {"rows": {}, "seconds": "cut off", **line}
            elif "ends" in line:
                steps[line["ends"]]["seconds"] = line["seconds"]
            else:
                steps[line["step"]]["rows"][line["job"], line["case"]] = line
        return steps

    def rows(self, step: str) -> list[Row]:
        return list(self.steps().get(step, {"rows": {}})["rows"].values())

    def failures(self) -> list[Row]:
        """What makes a run fail: not what was left out or skipped, nor anything in a step without consequences."""
        return [row for step in self.steps().values() if not step["harmless"] for row in step["rows"].values()
                if row["verdict"] not in (*GOOD, "left out")]  # fmt: skip


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |\n" for line in lines)


def summarize(results: Results) -> str:
    """A line per step."""
    rows = []
    for name, step in results.steps().items():
        counts = Counter(row["verdict"] for row in step["rows"].values())
        cases = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
        rows.append((name, step["seconds"], cases))
    return table(("step", "seconds", "cases"), rows)


def variant_times(results: Results) -> dict[str, dict[str, Row]]:
    """The rows of the sweep by case and variant."""
    cases: dict[str, dict[str, Row]] = {}
    for row in results.rows("sweep"):
        if row["verdict"] == "passed" and "ms" in row:
            cases.setdefault(row["case"], {})[row["job"]] = row
    return cases


def sweep_table(results: Results) -> str:
    """For each case: the kernels as they are, the best variant, and variants whose outputs have other bits."""
    lines = []
    for case, of_case in variant_times(results).items():
        now = of_case.get("as-is")
        best = min(of_case.values(), key=lambda row: float(row["ms"]))
        if now is None:
            lines.append((case, "", "", "none", ""))
            continue
        other = [name for name, row in of_case.items() if row.get("sum") != now.get("sum")]
        gain = now["ms"] / best["ms"]
        better = f"{best['job']}: {best['ms']:.3f} ({gain:.2f}x)" if gain >= LEAST_GAIN else "none"
        lines.append((case, f"{now['ms']:.3f}", f"{now['tflops']:.0f}", better, ", ".join(other)))
    return table(("case", "ms", "TFLOP/s", "better", "other bits"), lines) if lines else ""


def find_gains(results: Results) -> list[str]:
    """Variants that are faster on average and slower in no case: new values of tunables."""
    cases = variant_times(results).values()
    edits = {variant.name: f"`{variant.after}` for `{variant.before}`" for variant in sweep.variants()}
    found = []
    for name in dict.fromkeys(name for of_case in cases for name in of_case if name != "as-is"):
        both = [of_case for of_case in cases if {"as-is", name} <= of_case.keys()]
        gains = [of_case["as-is"]["ms"] / of_case[name]["ms"] for of_case in both]
        mean = math.prod(gains) ** (1 / len(gains)) if gains else 0.0
        if mean >= LEAST_GAIN and min(gains) > 1 / LEAST_GAIN:
            found.append(f"{edits.get(name, name)}: {mean:.3f}x over {len(gains)} cases")
    return found


def describe(results: Results) -> str:
    parts = [f"# Run on a GPU\n\n{summarize(results)}"]
    rows = [row for step in results.steps().values() for row in step["rows"].values()]
    for title, verdicts in (
        ("Failures", ("failed", "hang", "fault", "time", "missing", "running")), ("Findings", ("finding",)),
        ("Left out", ("left out",)),
    ):  # fmt: skip
        columns = ("step", "job", "case", "verdict", "detail")
        if chosen := [[row[column] for column in columns] for row in rows if row["verdict"] in verdicts]:
            parts.append(f"## {title}\n\n{table(columns, chosen)}")
    if benches := sorted((results.path / "bench").glob("*.md")):
        parts.append("## Benchmarks\n\n" + "\n".join(path.read_text() for path in benches))
    if tunables := sweep_table(results):
        parts.append(f"## Tunables\n\n{tunables}" + "".join(f"- new row: {line}\n" for line in find_gains(results)))
    return "\n".join(parts)


def write_report(results: Results) -> str:
    text = describe(results)
    (results.path / "report.md").write_text(text)
    return text


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise SystemExit(f"{__doc__}\nDIR: expected a folder, got {' '.join(sys.argv[1:])}")
    print(write_report(Results(Path(sys.argv[1]))))
