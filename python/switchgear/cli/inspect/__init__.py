# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear inspect MODEL --text FILE…`: a report on how a model's routers use its experts. `switchgear inspect
FILE.gguf`: what a GGUF file holds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from .. import checkpoint
from ..checkpoint import cut_texts, find_folder, load_model, read_texts
from ..common import CommandError, progress, require, require_writable, write_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoint.add_arguments(parser, tokens=16384, texts="texts, each a domain")
    parser.add_argument("--out", metavar="DIR", default="switchgear-inspect", help="folder of the report")


def run(args: argparse.Namespace) -> int:
    if args.model.endswith(".gguf"):
        from .gguf import describe

        print(describe(Path(args.model)))
        return 0
    require("transformers")
    require("matplotlib")
    from . import report
    from .measure import inspect

    torch.set_num_threads(args.threads)
    folder = find_folder(args.model)
    texts = read_texts(args.text, folder)
    out = Path(args.out)
    require_writable(out)  # The work takes minutes.
    model = load_model(folder, args.dtype)
    batches = cut_texts(texts, model, folder, tokens=args.tokens, length=args.length)
    with progress("reading") as advance:
        try:
            found = inspect(model, batches, checkpoint.choose_length(model, args.length), advance)
        except ValueError as error:  # no MoE layers, or none that can be observed
            raise CommandError(str(error)) from None
    found.about["model"] = folder.name
    report.draw(found, out)
    write_file("out", out / "report.md", report.report(found))
    write_file("out", out / "results.json", json.dumps(found.as_dict(), allow_nan=False) + "\n")
    print(report.summary(found))
    print(f"report: {out / 'report.md'}")
    return 0
