# SPDX-License-Identifier: BSD-3-Clause
"""Four processes train while some of them are killed, stopped or end, at random moments, and come back.

python tests/parallel/chaos.py --trials 100 [--seed 0] [--transport gloo]

Each process logs each step that it has applied, with digests of all weights and optimizer state that it has. `check`
reads the logs: no step is missing or half applied, all copies are equal, and the losses are those of a calm run.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, os.path.dirname(__file__))

import torch
import torch.distributed as dist
from parallel_pool import CTX, free_port
from test_soak import Resources
from torch import Tensor, nn

import switchgear
from switchgear.parallel import ExpertParallel, Training, checkpoint, elastic_step, join, place_experts

SIZE, EXPERTS, HIDDEN, TOKENS = 4, 8, 16, 48  # tokens of a step, over all ranks
HANG = 60.0  # seconds without progress that count as a hang
FAULTS = ("kill", "stop", "exit")


class Model(nn.Module):
    def __init__(self, parallel: ExpertParallel | None, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            switchgear.MoE(HIDDEN, 8, EXPERTS, 2, normalize=True, parallel=parallel) for _ in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@dataclass(frozen=True)
class Options:
    """Of a run."""

    trials: int = 100
    seed: int = 0
    transport: str = "auto"
    num_layers: int = 2
    num_replicas: int = EXPERTS
    timeout: float = 3.0
    pause: float = 0.005  # seconds of a step beside its work
    spare: bool = False  # the first process is never disturbed, and logs its resources
    resources_every: int = 100  # steps
    steps_between: int = 2  # at least, from a recovery to the next fault


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    return x, torch.sin(2 * x.roll(1, 1))


def loss_and_backward(model: nn.Module, step: int, rank: int, size: int) -> Tensor:
    x, target = (part.chunk(size)[rank] for part in batch(step))
    loss = (model(x) - target).square().mean()
    loss.backward()
    return loss


def make(
    parallel: ExpertParallel | None, num_layers: int, seed: int = 0
) -> tuple[nn.Module, torch.optim.Optimizer]:  # fmt: skip
    torch.manual_seed(seed)
    model = Model(parallel, num_layers)
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3)


def undisturbed(steps: int, num_layers: int) -> list[float]:
    """The losses of one process."""
    model, optimizer = make(None, num_layers)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        losses.append(float(loss_and_backward(model, step, 0, 1).detach()))
        optimizer.step()
    return losses


def digests(training: Training) -> dict[str, str]:
    """Of each expert of each layer with its optimizer state, and of everything else."""
    hashes: dict[str, Any] = defaultdict(hashlib.sha256)
    for name, tensor in sorted(checkpoint.state_dict(training.model, training.optimizer).items()):
        layer, _, rest = name.removeprefix("optimizer/").partition(".experts.")
        own = f"{layer}[{name.rpartition('[')[2]}" if rest and name.endswith("]") else "rest"
        hashes[own].update(name.encode() + tensor.numpy().tobytes())
    return {name: found.hexdigest()[:16] for name, found in hashes.items()}


# ---- a process -------------------------------------------------------------------------------------------------------


def work(number: int, port: int, folder: str, options: Options) -> None:
    """The process with this number; those from SIZE on join."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    torch.set_num_threads(1)
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(0))
    log = os.open(f"{folder}/{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(**entry: Any) -> None:
        os.write(log, json.dumps({"time": time.monotonic(), **entry}).encode() + b"\n")

    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    placement = place_experts([1.0] * EXPERTS, SIZE, num_replicas=options.num_replicas)
    given: dict[str, Any] = {
        "timeout": options.timeout, "transport": options.transport, "invariant": True, "placement": placement,
    }  # fmt: skip
    if number < SIZE:
        dist.init_process_group("gloo", store=store, rank=number, world_size=SIZE, timeout=timedelta(seconds=60))
    else:
        given |= {"outside": True, "store": store, "placement": None}
    parallel = ExpertParallel(name="chaos", **given)
    model, optimizer = make(parallel, options.num_layers, number if number >= SIZE else 0)
    training = Training(
        model, optimizer, on_failure="continue", num_replicas=options.num_replicas,
        on_change=lambda change: note(change=asdict(change)),
    )  # fmt: skip
    note(ready=True)
    if number >= SIZE:
        join(training, timeout=HANG)

    def closure() -> Tensor:
        time.sleep(options.pause)
        return loss_and_backward(model, training.steps, parallel.rank, parallel.size)

    while True:
        loss = float(elastic_step(training, closure))
        step = training.steps - 1
        entry = {
            "step": step, "loss": loss, "ranks": parallel.size, "rank": parallel.rank, "id": training.membership.id,
        }  # fmt: skip
        if not options.spare:
            entry["digests"] = digests(training)
        elif step % options.resources_every == 0:
            entry["resources"] = Resources.now()
        note(**entry)


# ---- the one who disturbs --------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    time: float
    entry: dict[str, Any]


@dataclass
class Logs:
    """What the processes have logged so far, by number."""

    folder: str
    entries: dict[int, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    _read: dict[int, int] = field(default_factory=dict)

    def update(self) -> None:
        for path in Path(self.folder).iterdir():
            number = int(path.name)
            with path.open("rb") as file:
                file.seek(self._read.get(number, 0))
                data = file.read()
            data = data[: data.rfind(b"\n") + 1]  # a killed process may leave half a line
            self._read[number] = self._read.get(number, 0) + len(data)
            self.entries[number] += map(json.loads, data.splitlines())

    def steps(self, numbers: set[int], since: float) -> dict[int, list[dict[str, Any]]]:
        """The steps that each has logged since then."""
        self.update()
        return {n: [e for e in _tail(self.entries[n], since) if "step" in e] for n in numbers}


def _tail(entries: list[dict[str, Any]], since: float) -> list[dict[str, Any]]:
    first = len(entries)
    while first and entries[first - 1]["time"] > since:
        first -= 1
    return entries[first:]


@dataclass
class Run:
    """Processes, and what was done to them."""

    options: Options
    folder: str
    port: int
    processes: dict[int, Any] = field(default_factory=dict)
    alive: set[int] = field(default_factory=set)
    recovered: list[float] = field(default_factory=list)  # seconds from a fault to the next step of the others
    rejoined: list[float] = field(default_factory=list)  # seconds from the start of a process to its first step

    def __post_init__(self) -> None:
        self.logs, self.next = Logs(self.folder), 0
        self.random = random.Random(self.options.seed)

    def spawn(self) -> int:
        number, self.next = self.next, self.next + 1
        process = CTX.Process(target=work, args=(number, self.port, self.folder, self.options), daemon=True)
        process.start()
        self.processes[number] = process
        self.alive.add(number)
        return number

    def wait(self, numbers: set[int], since: float, ranks: int | None, count: int = 1) -> float:
        """Until each has logged `count` steps with this number of ranks; returns when the last one did."""
        end = time.monotonic() + HANG
        while True:
            steps = self.logs.steps(numbers, since)
            times = [[e["time"] for e in found if ranks in (None, e["ranks"])] for found in steps.values()]
            if all(len(found) >= count for found in times):
                return max(found[count - 1] for found in times)
            for number in numbers:
                assert self.processes[number].is_alive(), f"process {number} has ended by itself"
            assert time.monotonic() < end, f"no progress of {numbers}: {self.tails()}"
            time.sleep(0.02)

    def tails(self) -> str:
        return "\n".join(f"{n}: {self.logs.entries[n][-2:]}" for n in sorted(self.alive))[:2000]

    def trial(self) -> str:
        options = self.options
        self.wait(self.alive, time.monotonic(), SIZE, options.steps_between)
        time.sleep(self.random.random() * 0.05)  # anywhere in a step
        fault = self.random.choice(FAULTS)
        victims = sorted(self.alive - {0} if options.spare else self.alive)
        victim = self.random.choice(victims)
        process, begin = self.processes[victim], time.monotonic()
        os.kill(process.pid, {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "exit": signal.SIGUSR1}[fault])
        self.alive.remove(victim)
        self.recovered.append(self.wait(self.alive, begin, SIZE - 1) - begin)
        begin = time.monotonic()
        if fault == "stop":
            os.kill(process.pid, signal.SIGCONT)  # it notices, and joins again by itself
            self.alive.add(victim)
            back = victim
        else:
            process.join()
            back = self.spawn()
            if self.random.random() < 0.25:  # it dies while it joins
                time.sleep(self.random.random() * 0.5)
                self.processes[back].kill()
                self.processes[back].join()
                self.alive.remove(back)
                begin = time.monotonic()
                back, fault = self.spawn(), f"{fault}, and again while it joins"
        self.rejoined.append(self.wait({back}, begin, SIZE) - begin)
        return f"{fault} of {victim}"

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()
        self.logs.update()


def run(options: Options, folder: str, verbose: bool = False) -> Run:
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    seen = Run(options, folder, port)
    try:
        for _ in range(SIZE):
            seen.spawn()
        for number in range(options.trials):
            what = seen.trial()
            if verbose:
                print(f"{number:4}  {what:40} {seen.recovered[-1]:6.2f} s  {seen.rejoined[-1]:6.2f} s", flush=True)
        seen.wait(seen.alive, time.monotonic(), SIZE, 3)
    finally:
        seen.close()
        del store
    return seen


# ---- what must hold --------------------------------------------------------------------------------------------------


def check(seen: Run) -> str:
    """Raises AssertionError if a step is missing, half applied, or differs from the undisturbed run. Returns a text."""
    losses: dict[int, dict[int, float]] = defaultdict(dict)
    held: dict[int, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    ranks: dict[int, set[int]] = defaultdict(set)
    logged = seen.logs.entries.values()
    changes = [entry["change"] for entries in logged for entry in entries if "change" in entry]
    # The last step of a member that was left behind, perhaps while it was stopped: the others may have repeated it.
    repeated = {member: change["step"] for change in changes for member in change["left"]}
    for entries in logged:
        last = -1
        for entry in entries:
            if "step" not in entry or entry["step"] >= repeated.get(entry["id"], math.inf):
                continue
            step = entry["step"]
            assert step > last, f"step {step} was applied after {last}"
            last = step
            ranks[step].add(entry["ranks"])
            losses[step][entry["rank"]] = entry["loss"]
            for name, digest in entry.get("digests", {}).items():
                held[step][name].add(digest)
    steps = max(losses) - 1  # the last one may have been cut off
    for step in range(steps):
        assert losses[step], f"nobody has applied step {step}"
        for name, found in held[step].items():
            assert len(found) == 1, f"step {step}: {name} differs between ranks"
        if held[step] and len(losses[step]) == max(ranks[step]):
            assert len(held[step]) == seen.options.num_layers * EXPERTS + 1, f"step {step}: only {sorted(held[step])}"
    assert not any(change["lost"] for change in changes)
    expected = undisturbed(steps, seen.options.num_layers)
    # A step may be seen by fewer ranks than took it, if they were killed before they could log it.
    complete = [step for step in range(steps) if len(losses[step]) == max(ranks[step])]
    apart = [abs(statistics.fmean(losses[step].values()) - expected[step]) for step in complete]
    noise = statistics.stdev(expected[steps // 2 :])
    assert statistics.fmean(apart) < noise, (statistics.fmean(apart), noise)
    lines = [f"{len(seen.recovered)} faults in {steps} steps, {len(complete)} of them logged by all"]
    lines.append(f"loss: {statistics.fmean(apart):.2g} from the undisturbed run, whose steps vary by {noise:.2g}")
    for name, values in (
        ("seconds from a fault to the next step of the others", seen.recovered),
        ("seconds from the return of a process to its first step", seen.rejoined),
        ("seconds of a change of ranks", [change["seconds"] for change in changes]),
        ("kB moved by a change", [change["bytes"] / 1000 for change in changes]),
    ):
        ordered = sorted(values)
        lines.append(f"{name}: median {statistics.median(ordered):.2f}, at most {ordered[-1]:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in (("trials", int), ("seed", int), ("transport", str), ("num_replicas", int), ("timeout", float)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=getattr(Options, name))
    with tempfile.TemporaryDirectory() as here:
        print(check(run(Options(**vars(parser.parse_args())), here, verbose=True)))
