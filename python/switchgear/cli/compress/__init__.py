# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear compress MODEL --recipe FILE --out DIR`: prunes, merges, sparsifies and quantizes by a recipe.

A recipe is JSON: steps, each a function of switchgear.compress with its options, and the text to calibrate on.

    {"calibration": {"text": ["code.txt", "prose.txt"], "tokens": 65536},
     "steps": [{"do": "prune_experts", "keep": 0.75, "criterion": "reap"},
               {"do": "quantize", "bits": 3, "method": "gptq"}]}
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ...utils.packages import page
from .. import checkpoint
from ..common import require, require_new


def add_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoint.add_arguments(parser)
    add = parser.add_argument
    add("--recipe", metavar="FILE", required=True, help=f"JSON, see {page('cli')}")
    add("--out", metavar="DIR", required=True, help="folder of the result; it must not exist")
    add("--fresh", action="store_true", help="discard what an interrupted run has written, instead of continuing")


def run(args: argparse.Namespace) -> int:
    require("transformers")
    require("safetensors")
    from .work import compress, read

    torch.set_num_threads(args.threads)
    require_new("out", args.out)
    recipe = read(args.recipe)
    for line in compress(checkpoint.find_folder(args.model), recipe, Path(args.out), args.dtype, fresh=args.fresh):
        print(line, flush=True)
    return 0
