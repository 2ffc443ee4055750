# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear inspect MODEL --text FILE…`: a report on how a model's routers use its experts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ..checkpoint import DTYPES, LENGTH, TINY, choose_length, cut_batches, find_folder, load_model, read_texts
from ..common import CommandError, at_least, check_writable, positive, require, write_file
from ..progress import progress


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"folder of a checkpoint; {TINY}: the model of train-tiny")
    add("--text", metavar="FILE", nargs="+", default=[],
        help="texts, each a domain (default: those of a model of train-tiny)")
    add("--out", metavar="DIR", default="switchgear-inspect", help="folder of the report")
    add("--tokens", type=positive, default=16384, metavar="N", help="tokens to read of each text")
    add("--length", type=at_least(2), metavar="N",
        help=f"tokens of a sequence (default: {LENGTH}, or fewer if the model has fewer positions)")
    add("--dtype", choices=DTYPES, default="auto", help="of weights and activations; auto: that of the checkpoint")
    add("--threads", type=positive, default=torch.get_num_threads(), metavar="N", help="CPU threads")
# fmt: on


def run(args: argparse.Namespace) -> int:
    require("transformers")
    require("matplotlib")
    from . import plots, report
    from .measure import inspect

    torch.set_num_threads(args.threads)
    folder = find_folder(args.model)
    texts = read_texts(args.text, folder)
    out = Path(args.out)
    check_writable(out)  # The work takes minutes.
    model = load_model(folder, args.dtype)
    length = choose_length(model, args.length)
    batches = {
        name: cut_batches(text, model, folder, tokens=args.tokens, length=length, name=name)
        for name, text in texts.items()
    }
    with progress("reading") as advance:
        try:
            found = inspect(model, batches, length, advance)
        except ValueError as error:  # no MoE layers, or none that can be observed
            raise CommandError(str(error)) from None
    found.about["model"] = folder.name
    for name, draw in plots.PLOTS.items():
        draw(found, out / name)
    write_file("out", out / "report.md", report.report(found))
    write_file("out", out / "results.json", json.dumps(found.as_dict(), allow_nan=False) + "\n")
    print(report.summary(found))
    print(f"report: {out / 'report.md'}")
    return 0
