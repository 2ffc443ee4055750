# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear train-tiny`: trains the tiny model once, tests its sensitivity, and keeps it in the cache."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from switchgear.cli.common import CommandError, positive, progress, require, require_writable, seed

from .tiny.cache import Tiny, folder_of, load, save, text_digest
from .tiny.sensitivity import Sensitivity
from .tiny.train import FULL, QUICK, Recipe


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--quick", action="store_true", help=f"{QUICK.steps} steps: 90 seconds, for tests of the machinery")
    add("--steps", type=positive, metavar="N", help=f"training steps (default: {FULL.steps})")
    add("--seed", type=seed, default=0, help="seed of weights and batches")
    add("--threads", type=positive, default=torch.get_num_threads(), metavar="N", help="CPU threads")
    add("--out", metavar="DIR", help="folder of the checkpoint (default: a place in ~/.cache/switchgear)")
    add("--again", action="store_true", help="train although the folder has a model, and replace it")
# fmt: on


def run(args: argparse.Namespace) -> int:
    from .tiny.sensitivity import measure
    from .tiny.text import load_domains
    from .tiny.train import train

    require("transformers")
    require("safetensors")
    torch.set_num_threads(args.threads)
    recipe = (QUICK if args.quick else FULL)._replace(seed=args.seed)
    if args.steps:
        recipe = recipe._replace(steps=args.steps)
    domains = load_domains()
    folder = Path(os.path.realpath(args.out or folder_of(recipe, domains)))  # a link stays, and what it names changes
    if (folder / "tiny.json").exists() and not args.again:
        tiny = load(folder)
        _check_same(tiny, recipe, text_digest(domains))
        return show(tiny, "in the cache" if not args.out else "trained earlier; --again trains anew")
    _check_place(folder)
    for domain in domains:
        print(f"{domain.name}: {domain.train.numel() / 2**20:.1f} MiB of {domain.source}")
    with progress("training") as advance:
        model = train(recipe, domains, advance)
    sensitivity = measure(model, domains, length=recipe.length)
    return show(save(model, recipe, domains, sensitivity, folder), "trained")


def _check_same(tiny: Tiny, recipe: Recipe, text: str) -> None:
    """CommandError for a model other than the requested one, which is neither shown for it nor replaced unasked."""
    about = tiny.about
    for name, wanted in recipe._asdict().items():
        if (found := about["recipe"].get(name)) != wanted:
            option = f"--{name}" if name in ("steps", "seed") else f"--out: a recipe with {name}"
            raise CommandError(f"{option}: expected {found}, as in {tiny.folder}, got {wanted}; --again trains anew")
    if about.get("text", text) != text:  # earlier models do not tell
        raise CommandError(f"--out: expected a model of the text of this machine in {tiny.folder}; --again trains anew")


def _check_place(folder: Path) -> None:
    """Before minutes of work."""
    is_taken = os.path.lexists(folder)  # a link that leads to itself is
    if is_taken and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "tiny.json").exists())):
        raise CommandError(f"--out: expected a new folder, or one of train-tiny, got {folder}")
    if Path.cwd().is_relative_to(folder):
        raise CommandError(f"--out: expected a folder that can be replaced, got {folder}, where this command runs")
    require_writable(folder.parent)


def show(tiny: Tiny, words: str) -> int:
    """Prints losses and conditions; 1 if one does not hold."""
    found = {key: value for key, value in tiny.about["sensitivity"].items() if key != "accepted"}
    sensitivity = Sensitivity(**found)
    print(f"{tiny.folder}: {words}")
    print("held-out loss, nats per byte: " + ", ".join(f"{n} {loss:.3f}" for n, loss in sensitivity.losses.items()))
    for condition, holds in sensitivity.conditions().items():
        print(f"{'yes' if holds else 'NO '}  {condition}")
    if not sensitivity.accepted:
        print("not accepted: too few steps? Compression of this model says little.")
    return 0 if sensitivity.accepted else 1
