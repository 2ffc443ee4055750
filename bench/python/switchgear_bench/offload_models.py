# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench offload --model gpt-oss-120b --memory 12G`: a published model at its true size, with generated
weights, in `generate` with its experts on the disk.

The store is generated layer by layer and deleted at the end, unless --checkpoint keeps it. The model runs in a process
of its own, in a control group with the limit. Routing is not the random router's, but drawn (offload_routings.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from switchgear.analysis.models import MODELS
from switchgear.cli import plan
from switchgear.cli.common import CommandError, markdown_table, positive, progress, require, share, size

from . import offload_model_files as files
from . import offload_routings as routings
from .memory_group import MemoryGroup, memory_limit
from .offload_model_worker import Task
from .options import choose
from .report import Blocks, section, threads
from .results import Row, rounded

SCHEMA = "switchgear-bench-offload-models/1"
PROMPT, WARM, TOKENS = 32, 8, 32
TRAINED = 128  # tokens of a step of training
QUICK = 4  # tokens, of each


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("a published model at its true size, with generated weights").add_argument
    add("--model", metavar="MODEL", help=f"{', '.join(MODELS)}, or a folder with a config.json")
    add("--memory", type=size, metavar="SIZE", help="limit of the control group: 12G")
    add("--routing", metavar="LIST", help=f"of {', '.join(routings.ROUTINGS)} (default: those that can be drawn)")
    add("--form", choices=files.FORMS, default="mxfp4", help="of the experts")
    add("--linears", choices=files.FORMS, default="int4", help="form of the linear layers, which stay in memory")
    add("--layers", type=positive, metavar="N", help="of the model (default: all, or what the disk has room for)")
    add("--slots", type=positive, metavar="N", help="experts of a layer in memory (default: what --memory leaves)")
    add("--recall", type=share, default=0.0, metavar="SHARE",
        help="predict the next layer's experts, each with this probability (default: predict none)")
    add("--train", action="store_true", help="time a step of LoRA on all experts, and decode nothing")
# fmt: on


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """An entry of "models" in the results."""
    for package in ("transformers", "rich"):
        require(package)
    if args.memory is None:
        raise CommandError("--model: expected --memory with it")
    names = choose("routing", args.routing, routings.ROUTINGS) if args.routing else list(routings.ROUTINGS)
    traces = _traces(names, is_needed=bool(args.routing))
    config = plan.config_of(args.model)
    layers = config.num_hidden_layers
    with _folder(args.checkpoint) as folder:
        path = folder / f"{Path(args.model).name}-{args.form}"
        config = files.with_layers(config, args.layers) if args.layers else config
        config = config if path.exists() else files.fit_layers(config, args.form, folder)
        if config.num_hidden_layers < layers:
            print(f"{config.num_hidden_layers} of the {layers} layers", flush=True)
        begin = perf_counter()
        with progress("writing") as advance:
            store = files.write_experts(config, args.form, path, advance)
        wrote = perf_counter() - begin
        torch.save(traces, folder / "traces.pt")
        entries = config.to_dict() | {"num_hidden_layers": config.num_hidden_layers}
        quick = QUICK if args.quick else None
        task = Task(
            json.loads(json.dumps(entries, default=str)), str(path), str(folder / "result.json"), args.linears, names,
            str(folder / "traces.pt"), quick or (TRAINED if args.train else PROMPT), quick or WARM, quick or TOKENS,
            int(args.train), args.recall, args.threads, args.slots,
        )  # fmt: skip
        found = run_apart(task, args.memory)
        records = next(iter(store.layers.values()))
        bits = 8 * records.record_bytes / sum(kind.rows * kind.cols for kind in records.kinds)
        return {
            "model": Path(args.model).name, "form": args.form, "linears": args.linears, "memory": args.memory,
            "layers": config.num_hidden_layers, "of_layers": layers, "experts": records.num_experts,
            "record_bytes": records.record_bytes, "store_bytes": store.nbytes, "write_seconds": round(wrote, 1),
            "plan": _predicted(config, args, bits, found["disk_rate"]), **found,
        }  # fmt: skip


def _traces(names: list[str], *, is_needed: bool) -> list[Any]:
    """Recorded traces; without them, the routing is left out unless it was asked for."""
    if routings.TRACE not in names:
        return []
    from .tiny.cache import newest

    try:
        return routings.record(newest())
    except CommandError:
        if is_needed:
            raise
        names.remove(routings.TRACE)
        return []


def _predicted(config: Any, args: argparse.Namespace, bits: float, disk_rate: float) -> list[dict[str, Any]]:
    """What `switchgear plan` says for the measured rate of the disk."""
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    options = ["", "--memory", str(args.memory), "--disk-rate", str(int(disk_rate)), "--expert-bits", str(bits)]
    try:
        *_, predictions = plan.predict(config, parser.parse_args(options))
    except CommandError:  # it does not fit
        return []
    return [rounded(one._asdict()) for one in predictions]


@contextmanager
def _folder(given: str | None) -> Iterator[Path]:
    """A folder that is removed at the end, whatever ends it, unless it was given."""
    if given:
        Path(given).mkdir(parents=True, exist_ok=True)
    with nullcontext(given) if given else TemporaryDirectory(prefix="switchgear-offload-") as name:
        yield Path(name)


def run_apart(task: Task, limit: int) -> dict[str, Any]:
    """The result of a task in a process of its own, in a control group if one can be made."""
    with memory_limit(limit) as made:
        group = made if isinstance(made, MemoryGroup) else None
        task = task._replace(group=str(group.folder) if group else None, limit=limit)
        command = [sys.executable, "-m", "switchgear_bench.offload_model_worker", json.dumps(task._asdict())]
        Path(task.result).unlink(missing_ok=True)
        done = subprocess.run(group.command(command) if group else command, check=False)
        if done.returncode == -9 and group:
            raise CommandError("--memory: expected more, the process was killed for its memory")
        if done.returncode:
            raise CommandError(f"the model's process ended with exit code {done.returncode}")
        return finish(json.loads(Path(task.result).read_text()), group)


def finish(found: dict[str, Any], group: MemoryGroup | None) -> dict[str, Any]:
    """A result in rounded numbers, with the peak of its group."""
    peak = (group.peak_bytes() if group else None) or found["peak_bytes"]
    rows = [rounded(row | {"peak_bytes": peak}) for row in found["results"]]
    training = rounded(found["training"] | {"peak_bytes": peak}) if found["training"] else None
    parts = {"results": rows, "training": training, "peak_bytes": peak, "limited": group is not None}
    entry: dict[str, Any] = rounded({name: value for name, value in found.items() if name not in parts})
    return entry | parts


# ---- tables ----------------------------------------------------------------------------------------------------------


def blocks(results: dict[str, Any]) -> Blocks:
    return {"models": lambda: section(note(results), table(results), verdicts(results))}


def text(results: dict[str, Any]) -> str:
    words = [
        routings.WORDS[name]
        for name in dict.fromkeys(row["routing"] for e in results["models"] for row in e["results"])
    ]
    return "\n".join([table(results), *verdicts(results), *words])


def note(results: dict[str, Any]) -> str:
    about = results["machine"]
    return (
        f"{about['model']}, {threads(about['threads'])}, {about['isa']}; torch {about['torch']}, transformers "
        f"{about['transformers']}, switchgear {about['switchgear']}.\n"
    )


def table(results: dict[str, Any]) -> str:
    """A row per model and routing."""
    header = [
        "model", "routing", "hits", "read, MB/token", "waited, ms/token", "disk, GB/s", "of it", "of it, while reading",
        "tokens/s", "read floor", "plan",
    ]  # fmt: skip
    lines = []
    for entry in results["models"]:
        predicted = {one["routing"].lower(): one for one in entry["plan"]}
        for row in entry["results"]:
            tokens, busy, read = row["tokens"], row["busy_seconds"], row["read_bytes"] + row["wasted_bytes"]
            one = predicted.get(row["routing"])
            reading = one["read_bytes"] / row["disk_rate"] if one else 0.0
            times = (reading + one["computing"], max(reading, one["computing"])) if one else ()
            lines.append([
                entry["model"], _words(row), f"{row['hits'] / max(row['hits'] + row['misses'], 1):.0%}",
                f"{read / tokens / 1e6:,.0f}", f"{1e3 * row['waited_seconds'] / tokens:.0f}",
                f"{row['disk_rate'] / 1e9:.2f}", f"{read / row['seconds'] / row['disk_rate']:.0%}",
                f"{read / busy / row['disk_rate']:.0%}" if busy else "", f"{tokens / row['seconds']:.2f}",
                f"{tokens * row['disk_rate'] / read:.2f}" if read else "",
                " to ".join(f"{1 / seconds:.2f}" for seconds in times),
            ])  # fmt: skip
    return markdown_table(header, lines, left=(0, 1))


def _words(row: Row) -> str:
    return f"{row['routing']}, {row['recall']:.0%} predicted" if row["recall"] else str(row["routing"])


def verdicts(results: dict[str, Any]) -> list[str]:
    lines = []
    for entry in results["models"]:
        gib = 2**30
        some = "" if entry["layers"] == entry["of_layers"] else f"{entry['layers']} of {entry['of_layers']} layers, "
        limit = "in a control group of" if entry["limited"] else "no control group could be made; meant for"
        lines.append(
            f"{entry['model']}: {some}{entry['store_bytes'] / gib:.1f} GiB of experts as {entry['form']}, "
            f"{entry['slots']} of {entry['experts']} in memory, linear layers as {entry['linears']}; {limit} "
            f"{entry['memory'] / gib:.1f} GiB, at most {entry['peak_bytes'] / gib:.1f} GiB used"
        )
        if (found := entry["training"]) is not None:
            lines.append(
                f"{entry['model']}: a step of LoRA of rank {found['rank']} on all experts, {found['tokens']} tokens, "
                f"{found['step_seconds']:.0f} s ({found['forward_seconds']:.0f} s forward), at most "
                f"{found['peak_bytes'] / gib:.1f} GiB"
            )
    return lines


def merged(earlier: dict[str, Any] | None, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The models of earlier runs; of the same one under the same conditions, what this run has not measured."""
    known = {_conditions(one): one for one in earlier["models"]} if earlier else {}
    if (before := known.get(_conditions(entry))) is not None:
        measured = [_case(row) for row in entry["results"]]
        rows = [row for row in before["results"] if _case(row) not in measured] + entry["results"]
        rows.sort(key=_case)
        rest = (
            {} if entry["results"] else {name: before[name] for name in ("plan", "slots", "cache_bytes", "peak_bytes")}
        )
        entry = entry | rest | {"results": rows, "training": entry["training"] or before["training"]}
    return list((known | {_conditions(entry): entry}).values())


def _conditions(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in ("model", "form", "linears", "memory", "layers"))


def _case(row: Row) -> tuple[int, float]:
    return routings.ROUTINGS.index(row["routing"]), row["recall"]
