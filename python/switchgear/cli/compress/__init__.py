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

from ..checkpoint import DTYPES, TINY, find_folder
from ..common import check_new, positive, require


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"folder of a checkpoint; {TINY}: the model of train-tiny")
    add("--recipe", metavar="FILE", required=True, help="JSON, see docs/cli.md")
    add("--out", metavar="DIR", required=True, help="folder of the result; it must not exist")
    add("--dtype", choices=DTYPES, default="auto", help="of the model; auto: that of the checkpoint")
    add("--fresh", action="store_true", help="discard what an interrupted run has written, instead of continuing")
    add("--threads", type=positive, default=torch.get_num_threads(), metavar="N", help="CPU threads")
# fmt: on


def run(args: argparse.Namespace) -> int:
    require("transformers")
    require("safetensors")
    from .recipe import read
    from .work import compress

    torch.set_num_threads(args.threads)
    check_new("out", args.out)
    recipe = read(args.recipe)
    for line in compress(find_folder(args.model), recipe, Path(args.out), args.dtype, fresh=args.fresh):
        print(line, flush=True)
    return 0
