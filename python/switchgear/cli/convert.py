# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear convert`: between dense and MoE checkpoints, and between layouts, shard by shard (switchgear.convert)."""

from __future__ import annotations

import argparse
from typing import Any

from .common import CommandError, name_options, progress, require, require_new, settings


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("sources", metavar="SOURCE", nargs="*", help="folder of a checkpoint; several for experts and merge")
    add("--recipe", metavar="FILE", help='JSON: {"operation": ..., "num_experts": ...}')
    add("--operation", metavar="NAME", help="instead of a recipe: upcycle, split, experts, merge, dense or layout")
    add("--set", metavar="NAME=VALUE", action="append", default=[], help="an option of it, the value as JSON")
    add("--out", metavar="DIR", help="folder of the result; it must not exist")
    add("--fresh", action="store_true", help="discard what an interrupted run has written, instead of continuing")
    add("--list", action="store_true", help="list the operations with their options, and stop")
# fmt: on


def run(args: argparse.Namespace) -> int:
    from switchgear.convert import checkpoints
    from switchgear.convert.directory import ConversionError

    if args.list:
        for operation, names in checkpoints.OPTIONS.items():
            print(f"{operation}: {', '.join(names)}")
        return 0
    if not args.sources or not args.out:
        raise CommandError("expected SOURCE and --out")
    require("safetensors")
    require_new("out", args.out)
    recipe = read_recipe(args)
    try:
        with progress("converting") as advance:
            report = checkpoints.run(recipe, args.sources, args.out, advance, resume=not args.fresh)
    except ConversionError as error:
        raise CommandError(name_options(error)) from None
    except OSError as error:
        raise CommandError(f"{error.filename or args.out}: {error.strerror or error}") from None
    for name, before, experts, how in report.layers:
        print(f"{name}: {before} -> {experts} experts, {how}")
    for note in report.notes:
        print(f"note: {note}")
    again = f", {len(report.resumed)} of them from an earlier run" if report.resumed else ""
    files = f"{len(report.shards)} file{'s' * (len(report.shards) != 1)}"
    print(f"{report.target}: {report.num_bytes / 1e6:,.1f} MB in {files}{again}")
    return 0


def read_recipe(args: argparse.Namespace) -> Any:
    """The path of --recipe, or a dict of --operation and --set."""
    if args.recipe:
        if args.operation or args.set:
            raise CommandError("expected either --recipe, or --operation with --set")
        return args.recipe
    if not args.operation:
        raise CommandError("expected --recipe or --operation")
    return {"operation": args.operation, **settings(args.set, "the operation", ("operation",))}
