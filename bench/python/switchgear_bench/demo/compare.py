# SPDX-License-Identifier: BSD-3-Clause
"""The demo: train the same small model with several experts implementations, check that they agree, compare.

Each implementation runs in its own process. All start from the same weights and see the same batches. The machine's
speed drifts, so they take turns of a few steps, round after round.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from switchgear.cli.common import CommandError, require, require_writable
from switchgear.cli.machine import cpu

from .. import machine
from . import report
from .agreement import Check, check_gradients, check_logits, check_losses, equal_choices, loss_bounds, loss_floor
from .corpus import batches, load_corpus
from .models import check_implementation
from .processes import Client, workers
from .progress import training_progress
from .worker import Settings, Step

TWIN = "twin"  # see agreement.py
TURN = 5  # steps per turn: few, since the machine's speed drifts; enough to outweigh cold caches in the first step
PROMPT_LENGTH, TEMPERATURE, GENERATION_ROUNDS = 128, 0.7, 3


def run(args: argparse.Namespace) -> int:
    names = [name.strip() for name in args.implementations.split(",") if name.strip()]
    if not names or len(set(names)) < len(names) or TWIN in names:
        raise CommandError(f"--implementations: expected distinct names, got {args.implementations!r}")
    for name in names:
        check_implementation(name)
    text = load_corpus(args.text)
    for part in (text.train, text.held_out):
        batches(part, 1, 1, max(args.sequence_length, PROMPT_LENGTH), 0)  # long enough?
    dtype = getattr(args, "dtype", "bfloat16" if machine.has_fast_bfloat16() else "float32")
    reference = next((name for name in ("grouped_mm", "eager") if name in names), names[0])
    settings = {
        name: Settings(
            args.model, reference if name == TWIN else name, dtype, args.steps, args.batch_size, args.sequence_length,
            args.learning_rate, args.seed, args.threads, args.text, twin=name == TWIN,
        )
        for name in (*names, TWIN)
    }  # fmt: skip
    require_writable(Path(args.out))  # before minutes of work
    results = compare(settings, names, reference, args.new_tokens)
    results["text"] = text.source
    report.write(results, Path(args.out))
    print(report.verdict(results))
    print(f"report: {Path(args.out) / 'report.md'}")
    return 0 if results["agree"] else 1


def compare(settings: dict[str, Settings], names: Sequence[str], reference: str, new_tokens: int) -> dict[str, Any]:
    """Runs everything; returns the content of results.json."""
    first = settings[names[0]]
    with workers(settings) as clients, tempfile.TemporaryDirectory() as folder:
        models = {name: client.receive() for name, client in clients.items()}
        gradients = {name: client.call("probe") for name, client in clients.items()}
        steps = train(clients, first.steps, first.batch_size * first.sequence_length)
        finished = {name: client.call("finish_training") for name, client in clients.items()}
        weights = str(Path(folder) / "weights.pt")
        clients[reference].call("save", path=weights)
        generated = generate(clients, weights, new_tokens)
    losses = {name: [step.loss for step in taken] for name, taken in steps.items()}
    loads = [step.load for step in steps[reference]]
    logits = {name: samples[0].pop("logits") for name, samples in generated.items()}
    layers, tokens = models[reference]["layers"], first.batch_size * (first.sequence_length - 1)
    floor = loss_floor(losses[reference][0], dtype=first.dtype, layers=layers, tokens=tokens)
    equal = {name: equal_choices([step.load for step in taken], loads) for name, taken in steps.items()}
    checks: dict[str, list[Check]] = {
        name: [
            check_gradients(gradients[name], gradients[reference], gradients[TWIN], dtype=first.dtype),
            *check_losses(losses[name], losses[reference], losses[TWIN], equal=equal[name], floor=floor, tokens=tokens),
            check_logits(logits[name], logits[reference], logits[TWIN], dtype=first.dtype, layers=layers),
        ]
        for name in names
        if name != reference
    }
    return {
        "schema": "switchgear-demo/1",
        "settings": first._replace(implementation="")._asdict() | {"text": bool(first.text)},
        "machine": cpu() | {"torch": torch.__version__, "transformers": require("transformers").__version__},
        "model": models[reference],
        "reference": reference,
        "implementations": {
            name: {
                "losses": losses[name],
                "equal_choices": equal[name],
                "steps": [step._asdict() for step in steps[name]],
                **finished[name],
                "memory_before_training": models[name]["memory_before_training"],
                "generated": generated[name],
                "checks": [check._asdict() | {"agrees": check.agrees} for check in checks.get(name, [])],
            }
            for name in names
        },
        "twin": {"losses": losses[TWIN]},
        "loss_bounds": loss_bounds(losses[reference], losses[TWIN], floor=floor).tolist(),
        "agree": all(check.agrees for rows in checks.values() for check in rows),
    }


def train(clients: dict[str, Client], steps: int, tokens_per_step: int) -> dict[str, list[Step]]:
    """All steps of all workers, TURN at a time. The order rotates, so that no worker always follows the same one."""
    taken: dict[str, list[Step]] = {name: [] for name in clients}
    order = list(clients)
    with training_progress(order, steps, tokens_per_step) as advance:
        for first in range(0, steps, TURN):
            for name in order:
                for step in clients[name].train(min(TURN, steps - first)):
                    taken[name].append(step)
                    advance(name, taken[name])
            order = order[1:] + order[:1]
    return taken


def generate(clients: dict[str, Client], weights: str, new_tokens: int) -> dict[str, list[dict[str, Any]]]:
    """Every worker generates from the same weights and the same prompt, in turns."""
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in clients}
    for client in clients.values():
        client.call("load", path=weights)
    for turn in range(GENERATION_ROUNDS + 1):
        for name, client in clients.items():
            if name == TWIN and turn:  # only its logits are needed
                continue
            sample = client.call(
                "generate",
                prompt_length=PROMPT_LENGTH,
                new_tokens=new_tokens if turn else 4,  # the first turn warms up
                temperature=TEMPERATURE,
            )
            if turn:
                del sample["logits"]
            samples[name].append(sample)
    return samples
