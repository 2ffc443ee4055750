# SPDX-License-Identifier: BSD-3-Clause
"""Train a MoE model whose experts are distributed over processes. The losses are those of a single process.

torchrun --nproc-per-node 4 examples/train_parallel.py [--steps 200] [--save FOLDER]
python examples/train_parallel.py                                          in a single process
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import switchgear
from switchgear.parallel import ExpertParallel, checkpoint, expert_parameters

HIDDEN, CLUSTERS, TOKENS = 32, 4, 256  # tokens per step, over all processes


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
            switchgear.MoE(HIDDEN, 64, num_experts=8, top_k=2, normalize=True, parallel=parallel) for _ in range(2)
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save", metavar="FOLDER", help="write a checkpoint")
    parser.add_argument("--losses", metavar="FILE", help="write the errors, a line each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")
    losses = train(arguments.steps, arguments.save)
    if arguments.losses and os.environ.get("RANK", "0") == "0":
        with open(arguments.losses, "w") as file:
            file.writelines(f"{loss!r}\n" for loss in losses)
    if dist.is_initialized():
        dist.destroy_process_group()
