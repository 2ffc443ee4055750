# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench layers`: MoE layers at the shapes of real models, against other implementations on this machine.

Each case is measured in its own process (worker.py). This file chooses the cases, divides the time among them, and
collects the results.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from switchgear.cli.common import console, require

from . import layer_tables as tables
from . import machine
from .case import FORMATS
from .ceilings import measure
from .competitors import COMPETITORS
from .options import (
    add_budget,
    add_cases,
    add_competitors_folder,
    add_files,
    add_modes,
    add_quick,
    add_routing,
    add_shapes,
    add_threads,
    begin,
    choose,
)
from .results import SCHEMA, load, merge, open_outputs, save
from .shapes import SHAPES
from .worker import Task, run_case

DEFAULT_SHAPES = "tiny,olmoe,qwen3-30b-a3b,mixtral-half"
ALL_INSTALLED = "installed"
# Default tokens by mode: of the usual run, of a quick one, of one against all competitors.
TOKENS: dict[str, tuple[int, ...]] = {"forward": (1, 16, 256, 2048), "train": (256,)}
QUICK_SHAPES, QUICK_TOKENS = "tiny,olmoe", {"forward": (1, 256), "train": (256,)}
TOKENS_AGAINST_ALL = {"forward": (1, 16, 256, 512, 2048), "train": (256, 512)}
BUDGET, QUICK_BUDGET = 540.0, 45.0  # seconds for all cases
CASE_BUDGET = 45.0  # for each case of a run against all competitors
START_SECONDS = 6.0  # what a process needs before it can measure
LONGEST_CASE, LONGEST_QUICK_CASE = 12.0, 3.0  # seconds of timing: more adds no precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_shapes(parser, SHAPES, DEFAULT_SHAPES)
    default = "bf16,fp32, and fp32 alone where bf16 is emulated"
    add_cases(parser, FORMATS, default, "1,16,256,2048; in training 256")
    add_modes(parser)
    add(
        "--competitors", metavar="LIST", nargs="?", const=ALL_INSTALLED,
        help=f"of {', '.join(COMPETITORS)}; without a list all that are installed (default: torch's, transformers')",
    )  # fmt: skip
    add_competitors_folder(parser)
    add_routing(parser)
    add(
        "--pages", choices=("huge", "default"), default="huge",
        help="of the weights, for everyone: huge, or as torch allocates them",
    )  # fmt: skip
    add(
        "--allocator", choices=("default", "tuned"), default="default",
        help="tuned: freed memory is kept, on huge pages (it halves the time of others' training steps)",
    )  # fmt: skip
    add_quick(parser, "a few small cases, within a minute")
    add_budget(parser, f"{BUDGET:.0f}; quick: {QUICK_BUDGET:.0f}; against all: {CASE_BUDGET:.0f} a case")
    add_threads(parser)
    add("--list", action="store_true", help="list shapes and competitors, and stop")
    add_files(parser, "source json csv markdown plot")


def run(args: argparse.Namespace) -> int:
    if args.list:
        tables.print_choices()
        return 0
    require("rich")
    if args.plot:
        require("matplotlib")
    about = begin(args, add_arguments)
    results = load(args.source, "--from") if args.source else measure_all(plan(args), args, about)
    tables.print_verdicts(console(), results)
    tables.write(results, open_outputs(args))
    return int(not args.source and any(row["wrong"] for row in results["results"]))


def plan(args: argparse.Namespace) -> list[Task]:
    """The cases of a run; each gets its share of the time when it starts."""
    everyone = args.competitors in (ALL_INSTALLED, "all")
    named = args.competitors is not None and not everyone
    dtypes = args.dtypes or (["bf16", "fp32"] if machine.has_fast_bfloat16() else ["fp32"])
    shapes = choose("shapes", args.shapes or (QUICK_SHAPES if args.quick else DEFAULT_SHAPES), SHAPES)
    names = [name for name, competitor in COMPETITORS.items() if competitor.default or everyone]
    if named:
        names = choose("competitors", args.competitors, COMPETITORS)
    tokens = QUICK_TOKENS if args.quick else TOKENS_AGAINST_ALL if everyone else TOKENS
    return [
        Task(shape, dtype, mode, count, args.routing, args.pages, args.allocator,
             tuple(name for name in names if named or COMPETITORS[name].runs(dtype, mode)), named, 0.0, args.threads)
        for shape in shapes for dtype in dtypes for mode in args.modes if mode in FORMATS[dtype].modes
        for count in args.tokens or tokens[mode]
    ]  # fmt: skip


def measure_all(tasks: list[Task], args: argparse.Namespace, about: dict[str, Any]) -> dict[str, Any]:
    """Runs the cases in order, prints a table after each, and returns the content of --json, saved after each case."""
    everyone = args.competitors in (ALL_INSTALLED, "all")
    budget = args.budget or (QUICK_BUDGET if args.quick else CASE_BUDGET * len(tasks) if everyone else BUDGET)
    longest = LONGEST_QUICK_CASE if args.quick else CASE_BUDGET if everyone else LONGEST_CASE
    end = perf_counter() + budget
    screen = console()
    torch.set_num_threads(args.threads)
    saved = Path(args.json) if args.json else None
    earlier = load(args.json, "--json") if saved and saved.is_file() and saved.stat().st_size else None
    with screen.status("measuring the ceilings of this machine"):
        ceilings = measure(sorted({task.dtype for task in tasks}), args.threads, 0.2 if args.quick else 0.5)
    tables.print_machine(screen, about, ceilings)
    results: dict[str, Any] = {"schema": SCHEMA, "machine": about, "ceilings": ceilings, "results": [], "skipped": []}
    late = []
    for i, task in enumerate(tasks):
        left = end - perf_counter()
        if left <= 0:
            late.append({"case": task.title, "competitor": "all", "reason": "the time of --budget is used up"})
            continue
        with screen.status(task.title) as status:
            seconds = max(1.0, min(longest, left / (len(tasks) - i) - START_SECONDS))
            measured = run_case(task._replace(seconds=seconds), status.update)
        results["results"] += measured.rows
        results["skipped"] += measured.skipped
        tables.print_case(screen, task.title, measured.rows, measured.skipped)
        if len(measured.openmp_runtimes) > 1:
            screen.print(f"[yellow]more than one OpenMP runtime is loaded: {', '.join(measured.openmp_runtimes)}[/]")
        if args.json:
            save(merge(earlier, results, args.json) if earlier else results, args.json)
    tables.print_skipped(screen, late)
    results["skipped"] += late
    return merge(earlier, results, args.json) if earlier else results
