# SPDX-License-Identifier: BSD-3-Clause
"""The file of a benchmark: {"schema", "machine", "ceilings", "results": rows, "skipped"}, grown case by case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..common import CommandError

SCHEMA = "switchgear-bench/2"
CASE = ("shape", "dtype", "mode", "tokens", "routing", "pages", "allocator")  # columns that say which case a row is of
SAME = ("model", "threads", "isa", "torch", "transformers")  # what must agree where runs share a file


def load(path: str, option: str, schema: str = SCHEMA) -> dict[str, Any]:
    """Results of an earlier run. CommandError where there are none."""
    try:
        results = json.loads(Path(path).read_text())
    except OSError as error:
        raise CommandError(f"{option}: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(f"{option}: {path} is not JSON: {error}") from None
    if not isinstance(results, dict) or results.get("schema") != schema:
        raise CommandError(f"{option}: expected a file of {schema}, got {path}")
    return results


def merge(earlier: dict[str, Any], later: dict[str, Any], path: str) -> dict[str, Any]:
    """Both runs; the later one's cases replace those of the earlier. CommandError where they don't compare."""
    check_same_machine(earlier, later, path)
    again = {_case(row) for row in later["results"]}
    titles = {entry["case"] for entry in later["skipped"]}
    rows = [row for row in earlier["results"] if _case(row) not in again] + later["results"]
    skipped = [entry for entry in earlier["skipped"] if entry["case"] not in titles] + later["skipped"]
    return later | {"results": sorted(rows, key=_order), "skipped": skipped}


def check_same_machine(earlier: dict[str, Any], later: dict[str, Any], path: str) -> None:
    for name in SAME:
        if earlier["machine"].get(name) != later["machine"].get(name):
            raise CommandError(
                f"--json: {path} is of {name} {earlier['machine'].get(name)}, this run of {later['machine'].get(name)}"
            )


def save(results: dict[str, Any], path: str) -> None:
    Path(path).write_text(json.dumps(results, indent=1) + "\n")


def cases_of(results: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The rows, case by case, in their order."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results["results"]:
        groups.setdefault(_case(row), []).append(row)
    return list(groups.values())


def is_undisturbed(rows: list[dict[str, Any]]) -> bool:
    """Whether every peer of a case that was timed had a turn without other processes."""
    return all(row["quiet_turns"] for row in rows if row["ms"])


def undisturbed(results: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The cases that say something."""
    return [rows for rows in cases_of(results) if is_undisturbed(rows)]


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in CASE)


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    from .shapes import SHAPES

    return list(SHAPES).index(row["shape"]), row["dtype"], row["mode"], row["tokens"], row["allocator"], row["routing"]
