# SPDX-License-Identifier: BSD-3-Clause
"""Results of a benchmark: a row per case and competitor. Their file has only medians, one line per case.

    {"schema", "machine", "ceilings", "cases": [CASE, MEASURED, "competitors": {name: MEDIANS}], "skipped"}

`completed` derives all other columns of a row from these. Files grow case by case.
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path
from typing import Any

from switchgear import files
from switchgear.cli.common import CommandError, check_file, write_file
from switchgear.cli.common import rounded as rounded
from switchgear.cli.common import write_json as write_json
from switchgear.utils.packages import first_line

from . import report
from .case import flops_of, moved_bytes
from .shapes import SHAPES

Row = dict[str, Any]
SCHEMA = "switchgear-bench/3"
CASE = ("shape", "dtype", "mode", "tokens", "routing", "pages", "allocator")  # columns that identify the case of a row
MEASURED = ("touched_experts", "multiply_rate", "read_ms")  # of a case
MEDIANS = ("ms", "relative_error", "quiet_turns")  # of a competitor; a wrong one has no time
SAME = ("model", "threads", "isa", "torch", "transformers")  # what must be equal in runs that share a file
HEAD = ("schema", "machine", "ceilings", "skipped")  # beside the cases


def completed(row: Row) -> Row:
    """A row of CASE, MEASURED, "competitor" and MEDIANS, plus the derived columns."""
    row = rounded(row)
    shape, seconds = SHAPES[row["shape"]], row["ms"] and row["ms"] / 1e3
    sizes = {name: size for name, size in shape._asdict().items() if name != "model"}
    flops = flops_of(shape, row["tokens"], row["mode"])
    weight_bytes = moved_bytes(shape, row["touched_experts"], row["dtype"], row["mode"])
    compute, memory = 1e3 * flops / row["multiply_rate"], row["read_ms"]  # the least time, and what limits it
    return row | sizes | {
        "flops": flops, "weight_bytes": weight_bytes,
        "floor_ms": max(compute, memory), "bound": "compute" if compute >= memory else "memory",
        "gflops": seconds and flops / seconds / 1e9, "gbytes_per_s": seconds and weight_bytes / seconds / 1e9,
        "percent_of_floor": seconds and max(compute, memory) / seconds / 10, "wrong": seconds is None,
    }  # fmt: skip


# ---- files -----------------------------------------------------------------------------------------------------------


def read_json(path: str, option: str, schema: str) -> dict[str, Any]:
    """Results of an earlier run. CommandError if there are none."""
    try:
        results = files.read_json(path)
    except OSError as error:
        raise CommandError(f"{option}: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(f"{option}: {path} is not JSON: {error}") from None
    if not isinstance(results, dict) or results.get("schema") != schema:
        raise CommandError(f"{option}: expected a file of {schema}, got {path}")
    return results


def save(results: dict[str, Any], path: str) -> None:
    cases = [
        {name: rows[0][name] for name in (*CASE, *MEASURED)}
        | {"competitors": {row["competitor"]: {name: row[name] for name in MEDIANS} for row in rows}}
        for rows in cases_of(results)
    ]
    head = {"schema": SCHEMA, "machine": results["machine"], "ceilings": results["ceilings"]}
    write_json(head | {"cases": cases, "skipped": results["skipped"]}, path)


def load(path: str, option: str) -> dict[str, Any]:
    """Reads what `save` wrote, with all columns."""
    results = read_json(path, option, SCHEMA)
    try:
        rows = [
            completed(case | {"competitor": name} | medians)
            for case in results.pop("cases")
            for name, medians in case.pop("competitors").items()
        ]
        return {name: results[name] for name in HEAD} | {"results": rows}
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise CommandError(f"{option}: expected the results of a run in {path}, got {first_line(error)}") from None


def write_csv(rows: list[Row], path: str) -> None:
    """All columns that any row has."""
    columns = dict.fromkeys(column for row in rows for column in row) or ["shape"]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(rows)
    write_file("csv", path, text.getvalue())


def open_outputs(args: argparse.Namespace) -> dict[str, str]:
    """Paths by kind, all writable. CommandError for one that is not, and for a document without places of tables."""
    outputs = {kind: path for kind in ("json", "csv", "markdown", "plot") if (path := getattr(args, kind, None))}
    for kind, path in outputs.items():
        if kind == "plot":
            try:
                Path(path).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CommandError(f"--plot: cannot write {path}: {error.strerror}") from None
            continue
        check_file(kind, path)
        if kind == "markdown":
            report.check(path)
    return outputs


# ---- runs and cases --------------------------------------------------------------------------------------------------


def merge(earlier: dict[str, Any], later: dict[str, Any], path: str) -> dict[str, Any]:
    """Both runs; cases of the later one replace those of the earlier. CommandError if they are not comparable."""
    check_same_machine(earlier, later, path)
    again = {_case(row) for row in later["results"]}
    titles = {title(*_case(row)) for row in later["results"]} | {entry["case"] for entry in later["skipped"]}
    rows = [row for row in earlier["results"] if _case(row) not in again] + later["results"]
    skipped = [entry for entry in earlier["skipped"] if entry["case"] not in titles] + later["skipped"]
    return later | {"results": sorted(rows, key=_order), "skipped": skipped}


def check_same_machine(earlier: dict[str, Any], later: dict[str, Any], path: str) -> None:
    for name in SAME:
        there, here = earlier["machine"].get(name), later["machine"].get(name)
        if there != here:
            raise CommandError(f"--json: {path} is of {name} {there}, this run of {here}")


def earlier_results(args: argparse.Namespace, schema: str, about: dict[str, Any]) -> dict[str, Any] | None:
    """What the file of --json has, to which this run adds. CommandError if it is of another machine."""
    if not (args.json and Path(args.json).exists() and Path(args.json).stat().st_size):
        return None
    earlier = read_json(args.json, "--json", schema)
    check_same_machine(earlier, {"machine": about}, args.json)
    return earlier


def cases_of(results: dict[str, Any]) -> list[list[Row]]:
    """The rows grouped by case, in order."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in results["results"]:
        groups.setdefault(_case(row), []).append(row)
    return list(groups.values())


def is_undisturbed(rows: list[Row]) -> bool:
    """Whether every timed competitor of a case had a turn without other processes."""
    return all(row["quiet_turns"] for row in rows if row["ms"])


def undisturbed(results: dict[str, Any]) -> list[list[Row]]:
    """The cases whose timings are valid."""
    return [rows for rows in cases_of(results) if is_undisturbed(rows)]


def extras(routing: str, allocator: str) -> list[str]:
    """What is unusual about a case, in words."""
    return ([routing] if routing != "balanced" else []) + (["tuned allocator"] if allocator == "tuned" else [])


def title(shape: str, dtype: str, mode: str, tokens: int, routing: str, pages: str, allocator: str) -> str:
    """A case in words. pages is the same in all cases of a run."""
    return ", ".join([shape, f"T={tokens}", dtype, mode, *extras(routing, allocator)])


def _case(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in CASE)


def _order(row: Row) -> tuple[Any, ...]:
    return list(SHAPES).index(row["shape"]), row["dtype"], row["mode"], row["tokens"], row["allocator"], row["routing"]
