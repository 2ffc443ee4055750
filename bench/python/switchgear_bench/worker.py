# SPDX-License-Identifier: BSD-3-Clause
"""One case of the benchmark in its own process: no threads, caches or freed memory of an earlier case remain.

The machine's ceilings and all competitors are measured in one run, in turns. Each result is compared with float64
before it is timed; a wrong competitor is not timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple
from unittest import mock

import torch

from switchgear.cli.machine import TUNED_ALLOCATOR, openmp_runtimes
from switchgear_bench.processes import Child

from . import machine
from .case import FORMATS, Case, Layer, call_of, make_case, make_weights
from .ceilings import multiply_rate, read_probe
from .competitors import COMPETITORS, Skip, look_in_folder
from .minifloats import STORED, in_bfloat16, make_stored
from .results import CASE, completed, title
from .shapes import SHAPES
from .timing import Timed, interleave
from .verify import verify

SLOWEST_CALL = 4.0  # seconds; a slower one would take the other cases' time
SPARE_BYTES = 2 << 30  # left free beside a competitor's own copy of the weights
READ, MULTIPLY = "(read)", "(multiply)"  # the probes, among the competitors that take turns


class Task(NamedTuple):
    """A case, and how to measure it. The strings are option values of `switchgear bench layers`."""

    shape: str
    dtype: str
    mode: str
    tokens: int
    routing: str
    pages: str
    allocator: str
    competitors: tuple[str, ...]
    named: bool  # by the user, so it runs however slow it is
    seconds: float  # for verifying and timing
    threads: int

    @property
    def title(self) -> str:
        return title(self.shape, self.dtype, self.mode, self.tokens, self.routing, self.pages, self.allocator)


class Measured(NamedTuple):
    rows: list[dict[str, Any]]
    skipped: list[dict[str, str]]  # case, competitor, reason
    openmp_runtimes: list[str]  # more than one: a competitor loaded its own, and their threads compete


def run_case(task: Task, say: Callable[[str], None]) -> Measured:
    """Measures a case in a new process; `say` receives progress messages."""
    with mock.patch.dict(os.environ, TUNED_ALLOCATOR if task.allocator == "tuned" else {}):
        child = Child(task.title, _serve, task)  # glibc reads its variables when a process starts
    with closing(child):
        while isinstance(answer := child.receive(), str):
            say(answer)
        return Measured(*answer)


def _serve(connection: Connection, task: Task) -> None:
    connection.send(("ok", measure(task, lambda text: connection.send(("ok", text)))))


def measure(task: Task, say: Callable[[str], None]) -> Measured:
    """Verifies, then times all competitors of one case."""
    torch.set_num_threads(task.threads)
    look_in_folder()
    say(f"{task.title}: making weights and what is expected of them")
    case = make(task)
    start = perf_counter()
    read = read_probe(case)

    def prepared(name: str) -> Layer:
        say(f"{task.title}: verifying {name}")
        return prepare(case, name, task.named, read)

    found = verify(case, task.competitors, prepared, task.title)
    say(f"{task.title}: timing {', '.join(found.layers)}")
    rates: dict[int, float] = {}
    calls: dict[str, Callable[[int], object]] = {READ: read}
    calls[MULTIPLY] = lambda number: rates.update({number: multiply_rate(case.dtype_name, task.threads)})
    calls |= {name: call_of(case, layer) for name, layer in found.layers.items()}
    seconds = max(task.seconds - (perf_counter() - start), task.seconds / 2)
    times = interleave(calls, seconds, leaves_memory=case.mode == "train")  # the gradients of the weights
    passes = 1 if case.mode == "forward" else 3  # over the weights: read twice, their gradients written
    counted_rates = [rates[number] for number in times.pop(MULTIPLY).numbers]
    about = {name: getattr(task, name) for name in CASE} | {
        "touched_experts": case.touched_experts, "multiply_rate": median(counted_rates),
        "read_ms": 1e3 * passes * median(times.pop(READ).seconds),
    }  # fmt: skip
    times |= {name: Timed([], 0, 0, []) for name in found.errors if name not in found.layers}
    rows = [
        completed(about | {
            "competitor": name, "ms": 1e3 * median(timed.seconds) if timed.seconds else None,
            "relative_error": found.errors[name], "error_limit": found.limit, "repetitions": len(timed.seconds),
            "turns": timed.turns, "quiet_turns": timed.quiet_turns,
        })
        for name, timed in times.items()
    ]  # fmt: skip
    return Measured(rows, found.skipped, [Path(path).name for path in openmp_runtimes()])


def make(task: Task) -> Case:
    """The case of a task; if its weights are bytes of a format, they are decoded too."""
    shape, huge_pages, stored = SHAPES[task.shape], task.pages == "huge", None
    if task.dtype in STORED:
        stored = make_stored(task.dtype, shape, huge_pages)
        weights = in_bfloat16(stored[0], huge_pages), in_bfloat16(stored[1], huge_pages)
    else:
        weights = make_weights(shape, FORMATS[task.dtype].dtype, huge_pages)
    return make_case(
        task.shape, shape, task.dtype, task.tokens, task.mode, task.routing, weights, task.pages, stored
    )  # fmt: skip


def prepare(case: Case, name: str, named: bool, read: Callable[[int], object]) -> Layer:
    """The layer of a competitor; raises Skip if it is not supported or takes too long."""
    competitor = COMPETITORS[name]
    if not competitor.runs(case.dtype_name, case.mode):
        raise Skip(f"has only {', '.join(competitor.dtypes)} and {', '.join(competitor.modes)}")
    whole = sum(weight.nbytes for weight in case.weights)
    if (free := machine.free_memory_bytes()) is not None and free < whole + SPARE_BYTES:
        raise Skip(f"{free / 2**30:.1f} GiB are free, and its copy of the weights may take {whole / 2**30:.1f}")
    if name == "hf_eager" and case.mode == "train" and not named:
        # Indexing the stacked weights makes autograd write and add a zero gradient of all experts for each expert:
        # one pass to write and three to add (read two, write one).
        start = perf_counter()
        read(0)
        seconds = 4 * (perf_counter() - start) * case.shape.num_experts
        if seconds > SLOWEST_CALL:
            why = "a gradient of all experts for each one (name it in --competitors to see)"
            raise Skip(f"some {seconds:.0f} s per step: {why}")
    return competitor.make(case)
