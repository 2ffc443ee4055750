# SPDX-License-Identifier: BSD-3-Clause
"""The process of `switchgear bench offload --model`: `python -m switchgear_bench.offload_model_worker TASK`.

TASK is JSON, a Task. The process builds the model, decodes with each routing or trains, and writes the result as JSON
to the path in it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch

import switchgear
from switchgear import offload
from switchgear.adapters import add_lora
from switchgear.cli.common import require

from . import offload_routings as routings
from .memory_group import MemoryGroup
from .offload_disk import read_rate
from .offload_model_files import build_on_meta, fill

RESERVE = 640 << 20  # bytes of the limit left for activations, keys and values, logits and the allocator
PER_TRAINED_TOKEN = 3 << 20  # bytes, in addition: logits, and what layers save
RANK = 4
READ_THREADS, READ_BYTES, PIECE = 4, 1 << 30, 1 << 20  # of the disk's rate


class Task(NamedTuple):
    """What to run. `slots` of each layer, or None for what the limit leaves."""

    config: dict[str, Any]
    store: str
    result: str
    linears: str
    routings: list[str]
    traces: str  # a file of torch
    prompt: int
    warm: int
    tokens: int
    steps: int  # of training; 0: decodes
    recall: float  # of predictions; 0: none
    threads: int
    slots: int | None = None
    group: str | None = None  # folder of the control group
    limit: int | None = None


def run(task: Task) -> dict[str, Any]:
    torch.manual_seed(0)
    begin = perf_counter()
    config = dict(task.config)
    model = fill(
        build_on_meta(require("transformers").AutoConfig.for_model(config.pop("model_type"), **config)), task.linears
    )
    store = offload.Store.open(task.store)
    found: dict[str, Any] = {"build_seconds": perf_counter() - begin}
    gc.collect()
    with suppress(AttributeError, OSError):  # glibc keeps what encoding has freed
        ctypes.CDLL(None).malloc_trim(0)
    rates = measure_disk(task, store)
    records = next(iter(store.layers.values()))
    foreseen = routings.Foreseen(records.num_experts, task.recall)
    options: dict[str, Any] = (
        {"prefetch": foreseen, "prefetch_slots": 2 * _layers_of(model)[0][2]} if task.recall else {}
    )
    with offload.offload(model, store, **_size(task, store), **options) as cache:
        found |= {
            "resident_bytes": _own_bytes(task), "slots": cache.slots // len(store.layers), "cache_bytes": cache.nbytes,
            "disk_rate": rates[0], "sequential_rate": rates[1], "results": [], "training": None,
        }  # fmt: skip
        if task.steps:
            found["training"] = train(model, task, store)
        else:
            switchgear.accelerate(model, whole_layers=True)
            found["results"] = decode_all(model, cache, foreseen, task, store)
        cache.close(restore=False)
    return found | {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10}


def _size(task: Task, store: offload.Store) -> dict[str, Any]:
    if task.slots is not None:
        return {"slots": task.slots}
    assert task.limit is not None
    spared = RESERVE
    if task.steps:
        for records in store.layers.values():
            (_, rows, cols, *_), (_, others, inner, *_) = records.kinds
            # Adapters, gradients and two moments, in bfloat16.
            spared += 4 * 2 * RANK * records.num_experts * (rows + cols + others + inner)
        spared += task.prompt * PER_TRAINED_TOKEN
    return {"bytes": task.limit - _own_bytes(task) - spared}


def _own_bytes(task: Task) -> int:
    if task.group is not None and task.limit is not None:
        return MemoryGroup(Path(task.group), task.limit).own_bytes()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


# ---- decoding --------------------------------------------------------------------------------------------------------


class _Clock:
    """A streamer of `generate`: when each token came, and what the cache had counted."""

    def __init__(self, cache: offload.Offloaded) -> None:
        self._cache = cache
        self.moments: list[tuple[float, Any, float]] = []

    def put(self, value: torch.Tensor) -> None:
        self.moments.append((perf_counter(), self._cache.statistics, self._cache.busy_seconds))

    def end(self) -> None:
        pass


def decode_all(
    model: Any, cache: offload.Offloaded, foreseen: routings.Foreseen, task: Task, store: offload.Store
) -> list[dict[str, Any]]:
    """Each routing in turn; the disk's rates are measured before and after."""
    rates = [measure_disk(task, store)]
    rows = []
    for name in task.routings:
        row = decode(model, cache, foreseen, name, task)
        rates.append(measure_disk(task, store))
        record, sequential = (max(pair) for pair in zip(*rates[-2:], strict=True))
        rows.append(row | {"disk_rate": record, "sequential_rate": sequential})
    return rows


def measure_disk(task: Task, store: offload.Store) -> tuple[float, float]:
    """Bytes per second with O_DIRECT: whole records in random order, and pieces in the order of the files."""
    files = [Path(task.store) / records.file for records in store.layers.values()]
    record = max(records.record_bytes for records in store.layers.values())
    return (
        read_rate(files, record, READ_THREADS, READ_BYTES),
        read_rate(files, min(PIECE, record), READ_THREADS, READ_BYTES, in_order=True),
    )


@torch.inference_mode()
def decode(
    model: Any, cache: offload.Offloaded, foreseen: routings.Foreseen, routing: str, task: Task
) -> dict[str, Any]:
    """Greedy decoding after a prompt; the first `warm` tokens are not counted."""
    clock, count = _Clock(cache), task.warm + task.tokens
    with _routed(model, routing, task, task.prompt + count) as foreseen.layers:
        prompt = torch.randint(model.config.vocab_size, (1, task.prompt))
        begin = perf_counter()
        model.generate(prompt, max_new_tokens=count + 1, min_new_tokens=count + 1, do_sample=False, streamer=clock)
    prefilled, first, last = clock.moments[1], clock.moments[1 + task.warm], clock.moments[-1]
    before, after = first[1], last[1]
    hits, misses = after.hits - before.hits, after.misses - before.misses
    steps = [two[0] - one[0] for one, two in pairwise(clock.moments[1 + task.warm :])]
    return {
        "routing": routing, "recall": task.recall, "tokens": task.tokens, "seconds": last[0] - first[0],
        "median_seconds": median(steps),
        "prompt": task.prompt, "prompt_seconds": prefilled[0] - begin,
        "prompt_bytes": prefilled[1].bytes - clock.moments[0][1].bytes,
        "hits": hits, "misses": misses, "read_bytes": after.bytes - before.bytes,
        "wasted_bytes": after.wasted_bytes - before.wasted_bytes,
        "waited_seconds": after.wait_seconds - before.wait_seconds, "busy_seconds": last[2] - first[2],
    }  # fmt: skip


def _routed(model: Any, routing: str, task: Task, count: int) -> Any:
    layers = _layers_of(model)
    traces = torch.load(task.traces) if routing == routings.TRACE else ()
    drawn = routings.draw(routing, [layer[1:] for layer in layers], count, traces)
    return routings.chosen(model, [name for name, _, _ in layers], drawn)


def _layers_of(model: Any) -> list[tuple[str, int, int]]:
    """Name, num_experts and top_k of each layer with experts."""
    from switchgear.integrations.moe_blocks import moe_blocks

    blocks = moe_blocks(model).values()
    return [(block.layer, block.num_experts, block.top_k) for block in blocks if block.top_k is not None]


# ---- training --------------------------------------------------------------------------------------------------------


def train(model: Any, task: Task, store: offload.Store) -> dict[str, Any]:
    """Steps of LoRA on all experts: forward, backward and AdamW on a sequence of `prompt` tokens."""
    adapters = add_lora(model, RANK, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(adapters, lr=1e-4)
    seconds, losses = [], []
    with _routed(model, task.routings[0], task, task.prompt * task.steps):
        for _ in range(task.steps):
            ids = torch.randint(model.config.vocab_size, (1, task.prompt))
            begin = perf_counter()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            middle = perf_counter()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append((middle - begin, perf_counter() - begin))
            losses.append(loss.item())
    return {
        "tokens": task.prompt, "rank": RANK, "parameters": sum(one.numel() for one in adapters), "losses": losses,
        "forward_seconds": median(one for one, _ in seconds), "step_seconds": median(both for _, both in seconds),
        "expert_bytes": store.nbytes, "routing": task.routings[0],
    }  # fmt: skip


def main(text: str) -> None:
    task = Task(**json.loads(text))
    torch.set_num_threads(task.threads)
    Path(task.result).write_text(json.dumps(run(task)))


if __name__ == "__main__":
    main(sys.argv[1])
