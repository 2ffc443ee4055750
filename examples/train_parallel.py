# SPDX-License-Identifier: BSD-3-Clause
"""Train a MoE model whose experts are distributed over processes. The losses are those of a single process.

torchrun --nproc-per-node 4 examples/train_parallel.py [--steps 200] [--save FOLDER]
torchrun --nproc-per-node 4 examples/train_parallel.py --chaos FOLDER      ranks are killed and stopped, and come back
python examples/train_parallel.py                                          in a single process

With --chaos, torchrun starts a guardian per rank, which starts the process that trains, disturbs it, and starts another
one if it is gone. (torchrun itself would restart all ranks.) Their log in FOLDER is drawn by plot_chaos.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import switchgear
from switchgear.parallel import (
    ExpertParallel,
    ExpertParallelError,
    Training,
    checkpoint,
    elastic_step,
    expert_parameters,
    join,
    place_experts,
)  # fmt: skip

HIDDEN, CLUSTERS, TOKENS, EXPERTS = 32, 4, 256, 8  # tokens per step, over all processes
NO_RANK = 3  # exit status of a process that found no rank to join


def tokens_and_targets(centers: Tensor, maps: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """x [count, H] around the centers, and the image of each x under the map of its cluster."""
    cluster = torch.randint(CLUSTERS, (count,))
    x = centers[cluster] + 0.3 * torch.randn(count, HIDDEN)
    return x, torch.einsum("th,thj->tj", x, maps[cluster])


class Model(nn.Module):
    """Two MoE layers with residual connections."""

    def __init__(self, parallel: ExpertParallel) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            switchgear.MoE(HIDDEN, 64, num_experts=EXPERTS, top_k=2, normalize=True, parallel=parallel)
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def train(steps: int, folder: str | None = None) -> list[float]:
    """The mean squared error of each step, over the tokens of all processes."""
    with ExpertParallel(timeout=60) as parallel:
        torch.manual_seed(0)  # all processes have the same data, and the same initial weights per expert
        centers, maps = torch.randn(CLUSTERS, HIDDEN), torch.randn(CLUSTERS, HIDDEN, HIDDEN) / HIDDEN**0.5
        model = Model(parallel)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        wrapped: nn.Module = model
        if parallel.size > 1:  # experts' gradients already cover all processes; DDP averages the others
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, expert_parameters(model))
            wrapped = DistributedDataParallel(model)
        share = TOKENS // parallel.size
        mine = slice(parallel.rank * share, (parallel.rank + 1) * share)
        errors = []
        for step in range(steps):
            x, target = tokens_and_targets(centers, maps, TOKENS)
            error = (wrapped(x[mine]) - target[mine]).square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            mean = error.detach() / parallel.size
            if parallel.size > 1:
                dist.all_reduce(mean)
            errors.append(mean.item())
            if parallel.rank == 0 and (step % 50 == 0 or step == steps - 1):
                print(f"step {step:4}  error {errors[-1]:.6f}", flush=True)
        if folder is not None:  # any number of processes can read it: checkpoint.load(model, folder, optimizer)
            checkpoint.save(model, folder, optimizer)
    return errors


# ---- with losses -----------------------------------------------------------------------------------------------------


def write(folder: str, **entry: Any) -> None:
    """Adds a line to the log of this rank."""
    with Path(folder, f"{os.environ['RANK']}.log").open("a") as log:
        log.write(json.dumps({"time": time.time(), **entry}) + "\n")


def go_on(steps: int, folder: str, comes_later: bool) -> None:
    """Trains with whoever is there. Every expert has a copy, so that no rank takes the only one with it."""

    def note(**entry: Any) -> None:
        write(folder, process=os.getpid(), **entry)

    if comes_later:
        parallel = ExpertParallel(timeout=2, name="chaos", outside=True)
    else:
        dist.init_process_group("gloo")
        copies = place_experts([1.0] * EXPERTS, dist.get_world_size(), num_replicas=EXPERTS)
        parallel = ExpertParallel(timeout=2, name="chaos", placement=copies)
    torch.manual_seed(0)
    centers, maps = torch.randn(CLUSTERS, HIDDEN), torch.randn(CLUSTERS, HIDDEN, HIDDEN) / HIDDEN**0.5
    model = Model(parallel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    training = Training(
        model, optimizer, on_failure="continue", num_replicas=EXPERTS,
        on_change=lambda change: note(change=asdict(change)),
    )  # fmt: skip

    def loss_and_backward() -> Tensor:
        torch.manual_seed(training.steps)  # the same data for a step, however many share it
        x, target = (part.chunk(parallel.size)[parallel.rank] for part in tokens_and_targets(centers, maps, TOKENS))
        error = (model(x) - target).square().mean()
        error.backward()
        time.sleep(0.01)  # a step of a larger model
        return error

    if comes_later:
        try:
            join(training, timeout=10)
        except ExpertParallelError as error:
            note(error=str(error))
            sys.exit(NO_RANK)
    while training.steps < steps:
        error = elastic_step(training, loss_and_backward)
        note(step=training.steps - 1, ranks=parallel.size, error=error.item())
        if parallel.rank == 0 and training.steps % 100 == 0:
            print(f"step {training.steps:4}  {parallel.size} ranks  error {error.item():.6f}", flush=True)
    parallel.close()


def is_complete(folder: str, rank: int, size: int) -> bool:
    """Whether all ranks have taken the last step, so that another one may be lost."""
    lines = Path(folder, f"{rank}.log").read_text().splitlines()
    return bool(lines) and json.loads(lines[-1]).get("ranks") == size


def guard(steps: int, folder: str, period: float = 5.0) -> None:
    """Keeps a process of this rank alive, and kills or stops it now and then; one rank at a time."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"{rank}.log").unlink(missing_ok=True)
    numbers = random.Random(rank)
    command = [sys.executable, __file__, "--steps", str(steps), "--chaos", folder, "--as"]
    process = subprocess.Popen([*command, "first"])
    turn = math.inf  # when this rank is disturbed next; all begin with the first step
    while True:
        try:
            status = process.wait(timeout=0.1)
        except subprocess.TimeoutExpired:
            if turn == math.inf and Path(folder, f"{rank}.log").exists():
                turn = time.monotonic() + (rank + 0.5) * period
            if time.monotonic() < turn:
                continue
            turn += size * period
            if not is_complete(folder, rank, size):
                continue
            fault = numbers.choice(("kill", "stop"))
            write(folder, process=process.pid, fault=fault)
            if fault == "stop":
                process.send_signal(signal.SIGSTOP)
                time.sleep(period - 1)  # longer than the timeout: the others continue without it
                process.send_signal(signal.SIGCONT)
            else:
                process.kill()
            continue
        if status in (0, NO_RANK):
            return
        process = subprocess.Popen([*command, "later"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save", metavar="FOLDER", help="write a checkpoint")
    parser.add_argument("--losses", metavar="FILE", help="write the errors, a line each")
    parser.add_argument("--chaos", metavar="FOLDER", help="ranks are killed and stopped, and come back; writes a log")
    parser.add_argument("--as", dest="role", choices=("first", "later"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.chaos:
        if arguments.role is None:
            guard(arguments.steps, arguments.chaos)
        else:
            go_on(arguments.steps, arguments.chaos, arguments.role == "later")
        sys.exit()
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")
    losses = train(arguments.steps, arguments.save)
    if arguments.losses and os.environ.get("RANK", "0") == "0":
        with open(arguments.losses, "w") as file:
            file.writelines(f"{loss!r}\n" for loss in losses)
    if dist.is_initialized():
        dist.destroy_process_group()
