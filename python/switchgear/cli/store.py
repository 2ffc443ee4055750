# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear store CHECKPOINT --form int4 --linears int8 --out DIR`: writes a packed checkpoint."""

from __future__ import annotations

import argparse

import torch

from ..convert.directory import ConversionError
from ..convert.stored import store_checkpoint
from ..utils.packages import page
from ..weights.store import PLAIN_LINEARS
from .checkpoint import DTYPES, find_folder
from .common import CommandError, progress, require, require_new, settings

_OF_CONFIG = DTYPES[0]  # auto


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="folder of a checkpoint of a Hugging Face model")
    add("--out", required=True, metavar="DIR", help="folder of the result; it must not exist")
    add_forms(parser)
    add("--dtype", choices=DTYPES, default=_OF_CONFIG, help="of plain weights; auto: that of the checkpoint")


def add_forms(parser: argparse.ArgumentParser) -> None:
    """The forms of experts and linear layers."""
    add = parser.add_argument
    add("--form", metavar="NAME",
        help=f"of the experts: int8, int4, fp8, ... ({page('weights')}); without it they stay as they are")
    add("--set", metavar="NAME=VALUE", action="append", default=[], help="an option of --form: group_size=64")
    add("--linears", metavar="NAME", help="form of the linear layers; without it they stay as they are")
    add("--skip", metavar="PATTERN", action="append",
        help=f"linear layers that stay plain, by path or a name in it (default: {' '.join(PLAIN_LINEARS)})")
# fmt: on


def run(args: argparse.Namespace) -> int:
    require("transformers")
    require("safetensors")
    require_new("out", args.out)
    folder = find_folder(args.checkpoint)
    dtype = None if args.dtype == _OF_CONFIG else getattr(torch, args.dtype)
    options = settings(args.set, "the form", ("source", "target", "form", "linears", "skip", "dtype", "progress"))
    skip = PLAIN_LINEARS if args.skip is None else args.skip
    try:
        with progress("storing") as advance:
            done = store_checkpoint(
                folder, args.out, args.form, linears=args.linears, skip=skip, dtype=dtype, progress=advance, **options
            )
    except (ConversionError, ValueError, TypeError) as error:
        raise CommandError(str(error)) from None
    print(done)
    return 0
