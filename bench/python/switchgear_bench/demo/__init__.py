# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear demo`: its arguments. Packages of the extra `demo` are imported only when it runs (compare.py)."""

from __future__ import annotations

import argparse

import torch

from switchgear.cli.common import at_least, not_negative, positive, require, seed

from .models import FAMILIES

IMPLEMENTATIONS = ("eager", "grouped_mm", "switchgear")


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", choices=FAMILIES, default="mixtral", help="architecture of the model")
    add("--steps", type=positive, default=60, metavar="N", help="training steps")
    add("--text", metavar="FILE", help="train on this file instead of Python's standard library")
    add("--dtype", choices=("bfloat16", "float32"), default=argparse.SUPPRESS,
        help="of weights and activations (default: bfloat16 if the CPU multiplies it, else float32)")
    add("--out", metavar="DIR", default="switchgear-demo", help="folder of the report")
    add("--seed", type=seed, default=0, help="seed of weights, batches and samples")
    add("--implementations", metavar="LIST", default=",".join(IMPLEMENTATIONS),
        help="experts implementations to compare, as transformers names them")
    add("--threads", type=positive, default=torch.get_num_threads(), metavar="N", help="CPU threads")
    add("--batch-size", type=positive, default=4, metavar="N", help="sequences per step")
    add("--sequence-length", type=at_least(2), default=256, metavar="N",
        help="bytes per sequence: one alone has no next one to learn")
    add("--learning-rate", type=not_negative, default=1e-3, metavar="X", help="peak learning rate of AdamW")
    add("--new-tokens", type=positive, default=256, metavar="N", help="bytes of text to generate")
# fmt: on


def run(args: argparse.Namespace) -> int:
    for package in ("transformers", "rich", "matplotlib", "numpy"):  # fail before minutes of work
        require(package)
    from .compare import run as compare

    return compare(args)
