# SPDX-License-Identifier: BSD-3-Clause
"""One run of `switchgear bench offload` in a process of its own: `python -m switchgear_bench.offload_worker TASK`.

TASK is JSON, a Task. The process decodes greedily and writes the result as JSON to the path in it. Files are in
offload_files.py; each runner is a function from a Task to a Decoder.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear.cli.common import require

from .llama import Llama
from .memory_group import MemoryGroup
from .offload_files import CHECKPOINT, GGUF, STORE, mapped_experts
from .offload_replay import Recorder, Replay

RESERVE = 28 << 20  # bytes of the limit left for activations, keys and values, and the allocator
CONTEXT = 1024  # tokens of llama.cpp's keys and values


class Task(NamedTuple):
    """What to run. `slots` of each layer, or None for what the limit leaves."""

    runner: str
    folder: str
    result: str
    spec: dict[str, int]
    tokens: int
    warm: int  # tokens decoded before the clock starts
    prompt: int
    threads: int
    group: str | None = None  # folder of the control group
    limit: int | None = None
    slots: int | None = None


class Decoder(NamedTuple):
    step: Callable[[list[int]], Tensor]  # token ids that follow those before -> logits [V] of the last one
    statistics: Callable[[], dict[str, Any]] = dict
    aside: Callable[[], None] = lambda: None  # called after each step, while the clock is stopped


# ---- runners ---------------------------------------------------------------------------------------------------------


def _transformers(model: Any) -> Callable[[list[int]], Tensor]:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)

    def step(ids: list[int]) -> Tensor:
        logits: Tensor = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1]
        return logits

    return step


def _loaded(task: Task, **options: Any) -> Any:
    """The whole model of the checkpoint."""
    transformers = require("transformers")
    transformers.logging.set_verbosity_error()
    path = Path(task.folder) / CHECKPOINT
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options).eval()


def _ours(task: Task) -> Any:
    import switchgear.integrations.transformers  # noqa: F401 - registers the implementation

    return _loaded(task, experts_implementation="switchgear")


def resident(task: Task) -> Decoder:
    """The whole model in memory, on huge pages."""
    from switchgear import store

    model = _ours(task)
    store(model, "plain")
    decode(Decoder(_transformers(model)), task)  # experts that are used for the first time take longer
    return Decoder(_transformers(model))


def mapped(task: Task) -> Decoder:
    """The experts are pages of the checkpoint's files. The same kernels read them there; no code of a cache runs."""
    model = _without_experts(task)
    for name, tensor in mapped_experts(Path(task.folder)).items():
        module, _, last = name.rpartition(".")
        model.get_submodule(module).register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))
    return Decoder(_transformers(model))


def _without_experts(task: Task) -> Any:
    """A model whose experts are on meta, and the rest in memory."""
    from safetensors import safe_open

    import switchgear.integrations.transformers  # noqa: F401 - registers the implementation

    transformers = require("transformers")
    path = Path(task.folder) / CHECKPOINT
    config = transformers.AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, experts_implementation="switchgear"
        )
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            rest = {
                name: tensors.get_tensor(name).clone()
                for name in tensors.keys()  # noqa: SIM118 - not a dict
                if ".experts." not in name
            }
        model.load_state_dict(rest, strict=False, assign=True)
    for module in model.modules():  # buffers that are no part of a checkpoint
        if hasattr(module, "inv_freq"):
            replaced = type(module)(config)
            module.inv_freq, module.original_inv_freq = replaced.inv_freq, replaced.original_inv_freq
    return model.eval()


def accelerate(task: Task) -> Decoder:
    """transformers' disk offload by accelerate: experts are on the disk, the rest in memory."""
    from transformers import AutoConfig

    layers = AutoConfig.from_pretrained(Path(task.folder) / CHECKPOINT).num_hidden_layers
    places: dict[str, str] = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places["lm_head"] = "cpu"
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for part in ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate"):
            places[f"{at}.{part}"] = "cpu"
        places[f"{at}.mlp.experts"] = "disk"
    model = _loaded(task, device_map=places, offload_folder=str(Path(task.folder) / "accelerate"))
    return Decoder(_transformers(model))


def llama(task: Task) -> Decoder:
    """llama.cpp on a mapped GGUF, through llama-cpp-python."""
    return Decoder(Llama(Path(task.folder) / GGUF, CONTEXT, task.threads).step)


def offloaded(task: Task) -> Decoder:
    """Our cache on the store, in what the limit leaves beside the rest of the model."""
    model, handle = _offloaded(task)
    return Decoder(_transformers(model), partial(_counters, handle))


def replayed(task: Task) -> Decoder:
    """Our cache; what it reads for a token is read once more by a plain loop, before the next token."""
    from switchgear.offload import Store

    model, handle = _offloaded(task)
    recorder = Recorder(handle._cache.reader)
    for layer in handle._cache.layers:
        layer.pool.reader = recorder
    path = Path(task.folder) / STORE
    replay = Replay([path / records.file for records in Store.open(path).layers.values()])
    counts = {"replayed_bytes": 0, "replayed_seconds": 0.0}

    def aside() -> None:
        nbytes, seconds = replay(recorder.events)
        recorder.events.clear()
        counts["replayed_bytes"] += nbytes
        counts["replayed_seconds"] += seconds

    return Decoder(_transformers(model), lambda: {**_counters(handle), **counts}, aside)


def _offloaded(task: Task) -> tuple[Any, Any]:
    from switchgear import offload

    folder = Path(task.folder)
    store = offload.Store.open(folder / STORE)
    model = offload.load_model(folder / CHECKPOINT, store)
    size: dict[str, Any] = {"slots": task.slots}
    if task.slots is None:
        assert task.group is not None
        assert task.limit is not None
        gc.collect()
        with suppress(AttributeError, OSError):  # glibc keeps what loading has freed
            ctypes.CDLL(None).malloc_trim(0)
        size = {"bytes": task.limit - MemoryGroup(Path(task.group), task.limit).own_bytes() - RESERVE}
    options: dict[str, Any] = {}
    if task.runner == "prefetch":  # a layer's experts are predicted, and as many rows hold them
        options = {"prefetch": offload.NextGate(model), "prefetch_slots": task.spec["top_k"]}
    return model, offload.offload(model, store, policy=offload.LRU(), **size, **options)


def _counters(handle: Any) -> dict[str, Any]:
    found = handle.statistics
    return {
        "hits": found.hits, "misses": found.misses, "loaded_bytes": found.bytes, "wasted_bytes": found.wasted_bytes,
        "waited_seconds": found.wait_seconds, "busy_seconds": handle.busy_seconds,
    }  # fmt: skip


RUNNERS: dict[str, Callable[[Task], Decoder]] = {
    "resident": resident,
    "offload": offloaded,
    "prefetch": offloaded,
    "replay": replayed,
    "mmap": mapped,
    "accelerate": accelerate,
    "llama.cpp": llama,
}


# ---- measuring -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode(decoder: Decoder, task: Task) -> dict[str, Any]:
    """Tokens, a digest of the logits of each, and the seconds of each step."""
    ids, tokens, digests, seconds = list(range(task.prompt)), [], [], []
    begin_bytes, begin = 0, dict[str, Any]()
    for number in range(task.tokens):
        if number == task.warm:
            begin_bytes, begin = read_bytes(), decoder.statistics()
        start = perf_counter()
        logits = decoder.step(ids)
        token = int(logits.argmax())
        seconds.append(perf_counter() - start)
        tokens.append(token)
        digests.append(hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()[:16])
        ids = [token]
        decoder.aside()
    end = decoder.statistics()
    counted = {name: end[name] - begin[name] for name in end} if end else {}
    return {
        "warm": task.warm, "tokens": tokens, "logits": digests, "seconds": seconds,
        "read_bytes": read_bytes() - begin_bytes - counted.get("replayed_bytes", 0), "statistics": counted,
    }  # fmt: skip


def read_bytes() -> int:
    """What this process has read from disks, page faults included; 0 where the system does not say."""
    try:
        found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found.group(1)) if found else 0


@torch.no_grad()
def beside_resident(task: Task) -> dict[str, Any]:
    """Our cache with a slot for each expert, and the resident model, which take turns token by token."""
    model, _ = _offloaded(task)
    found = decode(Decoder(_transformers(model)), task)  # loads the experts of these tokens
    steps = _transformers(model), resident(task).step
    seconds: tuple[list[float], list[float]] = ([], [])
    ids = list(range(task.prompt))
    for _ in range(task.tokens):
        for step, mine in zip(steps, seconds, strict=True):
            start = perf_counter()
            token = int(step(ids).argmax())
            mine.append(perf_counter() - start)
        ids = [token]
    offloaded_ms, resident_ms = (1e3 * median(mine[task.warm :]) for mine in seconds)
    return found | {"statistics": {"offloaded_ms": offloaded_ms, "resident_ms": resident_ms}}


def main(text: str) -> None:
    task = Task(**json.loads(text))
    torch.set_num_threads(task.threads)
    result = beside_resident(task) if task.runner == "all fits" else decode(RUNNERS[task.runner](task), task)
    Path(task.result).write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
