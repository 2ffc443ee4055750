# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench offload`: a model whose experts are three times as large as its memory, decoded greedily.

Each run is a process of its own in a control group with the same limit, after the pages of the model's files have been
dropped: our cache with and without prefetch, the same kernels on mapped files, accelerate's disk offload, llama.cpp.
The resident model runs without a limit; tokens and logits are compared with its. Runs add to the file of --json, and
the tables have medians.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from switchgear import files, offload
from switchgear.cli.common import CommandError, require

from . import llama
from . import offload_models as models
from . import offload_tables as tables
from .competitors import Skip
from .memory_group import MemoryGroup, memory_limit
from .offload_disk import read_ahead, read_rate
from .offload_files import CHECKPOINT, GGUF, STORE, Spec, drop_pages, write_checkpoint, write_llama
from .offload_worker import Task
from .options import add_competitors_folder, add_files, add_quick, add_threads, begin, choose
from .report import write_outputs
from .results import Row, earlier_results, read_json, rounded

SCHEMA = "switchgear-bench-offload/1"
LIMIT = 512 << 20
FULL = Spec()
QUICK = Spec(64, 32, 2, 8, 2, 128, 2, 1)
TOKENS, QUICK_TOKENS = 64, 8
SLOW = {"accelerate": 16, "mmap": 24, "llama.cpp": 32}  # tokens of those that may need a second for each
PROMPT, WARM = 16, 8
READ_THREADS, READ_BYTES, PIECE = 4, 1 << 30, 1 << 20  # of the disk's rate
LONGEST = 300.0  # seconds of a run
BASE = "resident"
FITS = "all fits"  # our cache with a slot for each expert, beside the resident model
ALL = (BASE, "offload", "prefetch", "replay", "mmap", "accelerate", "llama.cpp", FITS)
UNLIMITED = (BASE, FITS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--competitors", metavar="LIST", help=f"of {', '.join(ALL)} (default: all)")
    add_competitors_folder(parser)
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="where the model is kept, 7 GB (default: a temporary folder)"
    )
    add_quick(parser, "a small model")
    add_threads(parser)
    add_files(parser, "source json markdown")
    models.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    about = begin(args, add_arguments)
    if args.model or (args.source and _schema_of(args.source) == models.SCHEMA):
        return _run_models(args, about)
    results = read_json(args.source, "--from", SCHEMA) if args.source else _measured(args, about)
    print(tables.text(results))
    write_outputs(args, results, tables.blocks(results))
    return int(not args.source and any(row["wrong"] for row in results["results"]))


def _schema_of(path: str) -> Any:
    try:
        return files.read_json(path).get("schema")
    except (OSError, ValueError, AttributeError):  # read_json of .results says it in words
        return None


def _run_models(args: argparse.Namespace, about: dict[str, Any]) -> int:
    if args.source:
        results = read_json(args.source, "--from", models.SCHEMA)
    else:
        if args.competitors:
            raise CommandError("--competitors: not with --model")
        earlier = earlier_results(args, models.SCHEMA, about)
        found = models.merged(earlier, models.measure(args))
        results = {"schema": models.SCHEMA, "machine": about, "models": found}
    print(models.text(results))
    write_outputs(args, results, models.blocks(results))
    return 0


def _measured(args: argparse.Namespace, about: dict[str, Any]) -> dict[str, Any]:
    for package in ("transformers", "safetensors"):
        require(package)
    names = choose("competitors", args.competitors, ALL) if args.competitors else list(ALL)
    names = [BASE, *(name for name in names if name != BASE)]
    earlier = earlier_results(args, SCHEMA, about)
    with _folder(args.checkpoint) as folder:
        measured = measure(QUICK if args.quick else FULL, folder, names, args.threads, quick=args.quick)
    results = {"schema": SCHEMA, "machine": about, **measured}
    if earlier:
        results["results"] = earlier["results"] + results["results"]
        results["disk_rates"] = earlier["disk_rates"] + results["disk_rates"]
        skipped = results["skipped"]
        ran = {row["runner"] for row in measured["results"]}
        kept = [entry for entry in earlier["skipped"] if entry not in skipped and entry["runner"] not in ran]
        results["skipped"] = [*kept, *skipped]
    return results


@contextmanager
def _folder(given: str | None) -> Iterator[Path]:
    """A folder for the model's files, which are five times as large as its experts."""
    if given:
        Path(given).mkdir(parents=True, exist_ok=True)
    with nullcontext(given) if given else tempfile.TemporaryDirectory(prefix="switchgear-offload-") as name:
        yield Path(name)


def measure(spec: Spec, folder: Path, names: list[str], threads: int, *, quick: bool = False) -> dict[str, Any]:
    """One run of each: {"model", "limit", "disk_rates", "read_ahead", "results", "skipped"}."""
    skipped: list[dict[str, str]] = []
    _write_files(spec, folder, names, skipped)
    _disk_rate(spec, folder)  # discarded: caches below the disk then hold what they hold for the runs
    rates = [_disk_rate(spec, folder)]
    rows: list[Row] = []
    base: dict[str, Any] = {}
    limited = True
    for name in names:
        if any(entry["runner"] == name for entry in skipped):
            continue
        drop_pages(folder)
        limit = None if name in UNLIMITED else LIMIT
        try:
            found, reason = _run(task_of(name, spec, folder, threads, quick), limit)
        except CommandError as error:
            if name == BASE:
                raise
            skipped.append({"runner": name, "reason": str(error)})
            continue
        limited = limited and not reason
        if reason:
            skipped.append({"runner": name, "reason": f"ran without a limit: {reason}"})
        base = found if name == BASE else base
        rows.append(rounded(_row(name, found, base)))
        print(tables.line(rows[-1]), flush=True)
    rates.append(_disk_rate(spec, folder))
    return {
        "model": spec._asdict() | {"expert_bytes": spec.expert_bytes}, "limit": LIMIT if limited else None,
        "disk_rates": rates, "read_ahead": read_ahead(folder), "results": rows, "skipped": skipped,
    }  # fmt: skip


def _disk_rate(spec: Spec, folder: Path) -> float:
    """The best of whole records and of pieces, from the files that our cache reads, if it runs."""
    drop_pages(folder)
    stored = [
        path for path in (folder / STORE).rglob("*") if path.is_file() and path.stat().st_size >= spec.record_bytes
    ]
    files = sorted(stored or (folder / CHECKPOINT).glob("*.safetensors"))
    sizes = {spec.record_bytes, min(PIECE, spec.record_bytes)}
    return max(read_rate(files, size, READ_THREADS, READ_BYTES) for size in sizes)


def task_of(name: str, spec: Spec, folder: Path, threads: int, quick: bool) -> Task:
    tokens = QUICK_TOKENS if quick else SLOW.get(name, TOKENS)
    warm = min(WARM, tokens // 3)
    slots = spec.num_experts if name == FITS else max(spec.top_k, spec.num_experts // 4) if quick else None
    return Task(
        name, str(folder), str(folder / "result.json"), spec._asdict(), tokens, warm, PROMPT, threads, slots=slots
    )


def _write_files(spec: Spec, folder: Path, names: list[str], skipped: list[dict[str, str]]) -> None:
    """Those that are not there. A folder of another model is refused."""
    mark = folder / "model.json"
    if mark.exists():
        if json.loads(mark.read_text()) != spec._asdict():
            raise CommandError(f"--checkpoint: {folder} has the files of another model")
    elif any(folder.iterdir()):
        raise CommandError(f"--checkpoint: expected a new folder, or one of this command, got {folder}")
    else:
        write_checkpoint(spec, folder)
        mark.write_text(json.dumps(spec._asdict()))
    if {"offload", "prefetch", "replay", FITS} & set(names) and not (folder / STORE).exists():
        offload.write_store(folder / CHECKPOINT, folder / STORE)
    if "llama.cpp" in names:
        try:
            llama.package()
        except Skip as reason:
            skipped.append({"runner": "llama.cpp", "reason": str(reason)})
        else:
            if not (folder / GGUF).exists():
                write_llama(spec, folder)


def _run(task: Task, limit: int | None) -> tuple[dict[str, Any], str]:
    """The result of a task's process, and why it had no limit, or "". CommandError if the process failed."""
    if limit is None:
        return _process(task, None), ""
    with memory_limit(limit) as group:
        if isinstance(group, str):
            return _process(task, None), group
        return _process(task._replace(group=str(group.folder), limit=limit), group), ""


def _process(task: Task, group: MemoryGroup | None) -> dict[str, Any]:
    result = Path(task.result)
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "switchgear_bench.offload_worker", json.dumps(task._asdict())]
    try:
        done = subprocess.run(
            group.command(command) if group else command, capture_output=True, text=True, timeout=LONGEST, check=False
        )
    except subprocess.TimeoutExpired:
        raise CommandError(f"took more than {LONGEST:.0f} s") from None
    if done.returncode == -9 and group:
        raise CommandError("was killed for its memory")
    if done.returncode or not result.exists():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CommandError(f"ended with exit code {done.returncode}: {last}")
    found: dict[str, Any] = json.loads(result.read_text())
    found["peak_bytes"] = group.peak_bytes() if group else None
    return found


def _row(name: str, found: dict[str, Any], base: dict[str, Any]) -> Row:
    """A run in numbers. Only switchgear promises the bits of the logits."""
    count, timed = len(found["tokens"]), found["seconds"][found["warm"] :]
    same_tokens = found["tokens"] == base["tokens"][:count]
    same_logits = found["logits"] == base["logits"][:count]
    is_ours = name not in ("accelerate", "llama.cpp")
    return {
        "runner": name, "tokens": len(timed), "seconds": sum(timed), "read_bytes": found["read_bytes"],
        "peak_bytes": found["peak_bytes"], "same_tokens": same_tokens, "same_logits": same_logits,
        "wrong": not same_tokens or (is_ours and not same_logits), **found["statistics"],
    }  # fmt: skip
