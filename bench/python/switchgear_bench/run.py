# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench`: whole MoE layers at the shapes of real models, against other implementations on this machine.

Each case is measured in its own process (worker.py). This file chooses the cases, divides the time among them, and
collects the results.
"""

from __future__ import annotations

import argparse
import os
import platform
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import switchgear
from switchgear.cli import machine
from switchgear.cli.common import (
    above_zero,
    choose,
    console,
    listed,
    not_negative,
    optional,
    positive,
    positives,
    require,
)

from . import tables
from .case import FORMATS
from .ceilings import measure
from .competitors import COMPETITORS
from .competitors.registry import FOLDER
from .modes import LAYERS, mode_of
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


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shapes", metavar="LIST", help=f"of {', '.join(SHAPES)} (default: {DEFAULT_SHAPES})")
    add("--tokens", metavar="LIST", type=positives, help="tokens per call (default: 1,16,256,2048; in training 256)")
    add("--dtypes", metavar="LIST", type=listed(FORMATS),
        help=f"of the weights: {', '.join(FORMATS)} (default: bf16,fp32, and fp32 alone where bf16 is emulated)")
    add("--modes", metavar="LIST", type=listed(TOKENS), default="forward,train",
        help="forward, train (forward and backward)")
    add("--competitors", metavar="LIST", nargs="?", const=ALL_INSTALLED,
        help=f"of {', '.join(COMPETITORS)}; without a list all that are installed (default: torch's, transformers')")
    add("--competitors-folder", metavar="DIR",
        help=f"folder of competitors that cannot be installed beside this torch (default: ${FOLDER})")
    add("--routing", choices=("balanced", "zipf"), default="balanced",
        help="balanced: experts are equally likely; zipf: expert e is 1/(e+1) times as likely")
    add("--pages", choices=("huge", "default"), default="huge",
        help="of the weights, for everyone: huge, or as torch allocates them")
    add("--allocator", choices=("default", "tuned"), default="default",
        help="tuned: freed memory is kept, on huge pages (it halves the time of others' training steps)")
    add("--quick", action="store_true", help="a few small cases, within a minute")
    add("--budget", type=above_zero, metavar="SECONDS",
        help=f"for all cases (default: {BUDGET:.0f}; quick: {QUICK_BUDGET:.0f}; against all: {CASE_BUDGET:.0f} a case)")
    add("--threads", type=positive, default=torch.get_num_threads(), metavar="N", help="CPU threads")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where the layers run (cuda: at shapes of GPU models)")
    add("--model", action="store_true", help="predict what the CUDA kernels cost, beside published figures, and stop")
    add("--threads-model", action="store_true",
        help="predict layers on 2 to 128 threads and 1 to 8 memory nodes from their tasks, recorded here, and stop")
    add("--parallel", type=positive, metavar="N", help="experts distributed over N processes; see docs/parallel.md")
    add("--nodes", type=positive, default=1, metavar="N", help="that these processes are on, of equal size")
    add("--bandwidth", type=not_negative, metavar="MB/s",
        help="of their links (default: that of the experts; 0: no limit)")
    add("--gflops", type=not_negative, default=0.0, metavar="GFLOP/s", help="of their experts (default: no limit)")
    add("--routers", action="store_true", help="what routing policies cost, by the layer and by plain torch, and stop")
    add("--adapters", action="store_true",
        help="what LoRA on every expert costs, beside the frozen base, PEFT and formulas of torch, and stop")
    add("--compress", action="store_true",
        help="loss, bytes and time of a trained model (switchgear train-tiny), compressed in each way, and stop")
    add("--quality", action="store_true",
        help="losses of five routers in the same small language model (LibMoE's question), and stop")
    add("--offload", action="store_true",
        help="decode with experts on the disk in 512 MiB of memory, beside other implementations, and stop")
    add("--generate", action="store_true",
        help="tokens/s of whole models in generate, beside transformers' default and llama.cpp, and stop")
    add("--checkpoint", metavar="DIR", help="folder of train-tiny for --compress (default: the one in the cache); "
        "where --offload keeps its model, 7 GB (default: a temporary folder)")
    add("--ranks", metavar="LIST", type=positives, help="of the adapters (default: 8,16,64)")
    add("--list", action="store_true", help="list shapes and competitors, and stop")
    add("--from", dest="source", metavar="FILE", help="measure nothing: tables and pictures of the results in it")
    add("--json", metavar="FILE", help="write medians, with machine and ceilings, beside those that the file has")
    add("--csv", metavar="FILE", help="write one row per result")
    add("--markdown", metavar="FILE", help="write tables, or fill in those of a document")
    add("--plot", metavar="DIR", help="write a picture per shape: time over tokens, with the floor")
# fmt: on


def run(args: argparse.Namespace) -> int:
    mode = mode_of(_given(args))
    if args.competitors_folder:
        os.environ[FOLDER] = args.competitors_folder  # the processes of the cases inherit it
    if args.list:
        tables.print_choices()
        return 0
    if mode is LAYERS:
        return _run_layers(args)
    module = import_module(f".{mode.module}", __package__)  # some need transformers
    if not mode.describes:
        return int(module.run(args))
    open_outputs(args)  # before minutes of work
    return int(module.run(args, describe_machine(args.threads)))


def _given(args: argparse.Namespace) -> set[str]:
    """The options that do not have their defaults."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = parser.parse_args([])
    return {name for name, default in vars(defaults).items() if getattr(args, name) != default}


def _run_layers(args: argparse.Namespace) -> int:
    require("rich")
    if args.plot:
        require("matplotlib")
    if args.source:
        results = load(args.source, "--from")
        outputs = open_outputs(args)
    else:
        tasks = plan(args)
        outputs = open_outputs(args)  # before minutes of work
        results = measure_all(tasks, args)
    tables.print_verdicts(console(), results)
    tables.write(results, outputs)
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


def describe_machine(threads: int) -> dict[str, Any]:
    transformers, _ = optional("transformers")
    return machine.cpu() | {
        "threads": threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "transformers": getattr(transformers, "__version__", None),
        "switchgear": switchgear.__version__,
        "isa": switchgear.cpu_isa(),
        "environment": machine.environment(),
    }


def measure_all(tasks: list[Task], args: argparse.Namespace) -> dict[str, Any]:
    """Runs the cases in order, prints a table after each, and returns the content of --json, saved after each case."""
    everyone = args.competitors in (ALL_INSTALLED, "all")
    budget = args.budget or (QUICK_BUDGET if args.quick else CASE_BUDGET * len(tasks) if everyone else BUDGET)
    longest = LONGEST_QUICK_CASE if args.quick else CASE_BUDGET if everyone else LONGEST_CASE
    end = perf_counter() + budget
    screen = console()
    torch.set_num_threads(args.threads)
    about = describe_machine(args.threads)
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
