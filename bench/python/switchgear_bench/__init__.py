# SPDX-License-Identifier: BSD-3-Clause
"""Benchmarks of switchgear against other implementations, models of costs, and the demo: each command is a module with
`add_arguments` and `run`."""

from __future__ import annotations

from collections.abc import Sequence

from switchgear.cli import COMMANDS as SWITCHGEAR
from switchgear.cli import Program

COMMANDS = {
    "layers": "time MoE layers at the shapes of real models, against other implementations",
    "cuda": "time layers and single ops on a GPU, at the shapes of published figures",
    "routers": "time routing policies, by the layer and by plain torch",
    "linears": "time the linears of models, beside torch's and a plain read of their weights",
    "adapters": "time LoRA on every expert, beside the frozen base, PEFT and formulas of torch",
    "offload": "decode with experts on the disk in 512 MiB of memory, beside other implementations",
    "generate": "time whole models in generate, beside transformers' default and llama.cpp",
    "serve": "time servers with several clients at once, and compare answers, beside transformers' server",
    "parallel": "time experts distributed over processes of this machine",
    "compress": "measure loss, bytes and time of a trained model, compressed in each way",
    "quality": "train a small language model with five routers, and compare the losses",
    "threads": "predict layers on 2 to 128 threads and 1 to 8 memory nodes from their tasks, recorded here",
    "model": "predict what the CUDA kernels cost, beside published figures",
    "tables": "write the tables of documents again, from files of results",
    "demo": SWITCHGEAR["demo"],
    "train-tiny": SWITCHGEAR["train-tiny"],
}


def main(argv: Sequence[str] | None = None, name: str = "switchgear-bench") -> int:
    """Runs one command, and returns the exit status of `switchgear.cli.Program.main`."""
    about = "Benchmarks of switchgear's MoE layers, and its demo."
    return Program(name, about, __name__, COMMANDS).main(argv)
