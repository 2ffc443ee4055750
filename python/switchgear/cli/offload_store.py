# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear offload-store CHECKPOINT --out PATH --form int4`: writes the experts of a checkpoint into a store."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path

import torch

from ..files import is_gguf, read_json
from ..utils.packages import page
from .checkpoint import DTYPES, find_folder
from .common import CommandError, name_options, progress, require, require_new, settings

_OF_CONFIG = DTYPES[0]  # auto


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="folder of a checkpoint of a Hugging Face model, or a GGUF file")
    add("--out", required=True, metavar="PATH", help="folder of the store; it must not exist")
    add("--form", metavar="NAME",
        help=f"plain, int8, fp8, ... ({page('weights')}); 'as published', the default of a GGUF file, keeps every bit")
    add("--set", metavar="NAME=VALUE", action="append", default=[], help="an option of the form: group_size=64")
    add("--dtype", choices=DTYPES, default=_OF_CONFIG, help="of plain weights; auto: that of the checkpoint")
    add("--fresh", action="store_true", help="discard what an interrupted run has written, instead of continuing")
    add("--verify", action="store_true", help="read the store and compare all checksums at the end")
# fmt: on


def run(args: argparse.Namespace) -> int:
    require("transformers")
    require("safetensors")
    from ..offload import write_store
    from ..offload.store_sources import AS_PUBLISHED

    require_new("out", args.out)
    source = Path(args.checkpoint) if is_gguf(args.checkpoint) else find_folder(args.checkpoint)
    form = args.form or (AS_PUBLISHED if is_gguf(source) else "plain")
    dtype = None if args.dtype == _OF_CONFIG else getattr(torch, args.dtype)
    options = settings(args.set, "the form", ("source", "path", "form", "dtype", "progress", "resume"))
    if form == "plain" and (method := _quantization(source)) is not None:
        kept = f"--form {AS_PUBLISHED!r} keeps them"
        print(f"the checkpoint is {method}: its experts become plain and larger; {kept}", flush=True)
    try:
        with progress("writing") as advance:
            store = write_store(source, args.out, form, dtype=dtype, progress=advance, resume=not args.fresh, **options)
        if args.verify:
            with progress("verifying") as advance:
                store.verify(advance)
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(name_options(error)) from None
    print(store)
    return 0


def _quantization(folder: Path) -> str | None:
    """The method that the config names. None without one, and for a config that write_store refuses."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return str(read_json(folder / "config.json")["quantization_config"]["quant_method"])
    return None
