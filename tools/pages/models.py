# SPDX-License-Identifier: BSD-3-Clause
"""Writes docs/models.md: what published models need, how fast `switchgear plan` expects them, and what works for them.

PYTHONPATH=tests python tools/pages/models.py [path]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import switchgear
from switchgear.analysis import Cost
from switchgear.analysis.models import MODELS
from switchgear.cli import plan
from switchgear.cli.offload_plan import count_head
from switchgear.integrations.gguf_architectures import ARCHITECTURES
from tiny_models import build, example_inputs

RESULTS = Path(__file__).parents[2] / "bench/results/offload-models-avx512bf16.json"
PLAIN_READ = 35.1e9  # bytes per second of memory on its machine
MEMORY = 24 << 30
EXACT = 1e-4  # of the logits, in float32
FORMS = {"bf16": 16.0, "int8": 8.0, "int4 or mxfp4": 4.25}  # bits of a weight; embeddings and head stay as they are

PAGE = """# Published models

```
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
switchgear.accelerate(model, whole_layers=True)
switchgear.store(model, "mxfp4", linears="int4")  # or "int8"; without this line bfloat16
```

What does not fit runs [from disk](offload.md), files of llama.cpp by [`load_gguf`](gguf.md).

| model | model type | parameters, active, ·10⁹ | {forms}, GiB | tokens/s | works |
|---|---|---:|---:|---:|---|
{rows}

- **tokens/s**: predicted by `switchgear plan` for one short text on {machine} that
  read {memory_rate:.0f} GB/s of memory and {disk_rate:.1f} GB/s of disk: experts as mxfp4, linear layers as int4,
  {memory} GiB of memory, choices skewed (Zipf). Measured there: Qwen3-30B-A3B as Q4_0 in memory 11.2,
  [others from disk](offload.md#measured-at-true-size). Two figures: experts are on disk; the higher one overlaps
  reading and computing.
- **works**, run on tiny random models of the type, without vision: {names}.
  The experts of [every type](model_types.md) run on our kernels.

Generated: `PYTHONPATH=tests python tools/pages/models.py docs/models.md`
"""


def find_disk_rate(models: list[Any]) -> float:
    """Bytes per second that were read in the median run of the measured models."""
    rates = sorted(run["disk_rate"] for model in models for run in model["results"])
    return float(rates[len(rates) // 2])


def predict(name: str, disk_rate: float, *, own_layers: bool) -> str:
    """Tokens per second: without and with overlap, one figure if nothing is read."""
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    rates = ["--disk-rate", str(int(disk_rate)), "--memory-rate", str(int(PLAIN_READ))]
    args = parser.parse_args([name, "--memory", str(MEMORY), *rates, *["--own-layers"] * own_layers])
    *_, (*_, zipf) = plan.predict(plan.config_of(name), args)
    slow, fast = 1 / (zipf.reading + zipf.computing), 1 / max(zipf.reading, zipf.computing)
    return f"{slow:.2g}" if slow == fast else f"{slow:.2g} to {fast:.2g}"


def count_bytes(cost: Cost, head: int, bits: float) -> float:
    return cost.weight_bytes(bits) + (cost.embedding + head) * (16 - bits) / 8


def try_type(model_type: str) -> dict[str, bool]:
    """What works, by name: each on a model of its own, which then runs. AssertionError if results are wrong."""
    model: Any = build(model_type)
    expected = run(model)
    is_whole = any(one.path == "whole layer" for one in switchgear.accelerate(model, whole_layers=True))
    check_close(model, expected)
    return {
        "whole layers": is_whole,
        "offload": works(model_type, offload, expected),
        "stored forms": works(model_type, store, None),
        "LoRA": works(model_type, lambda model: switchgear.adapters.add_lora(model, rank=2), expected),
        "GGUF": model_type in {known.model_type for known in ARCHITECTURES.values()},
        "EP of transformers": bool(model.config.base_model_ep_plan),
    }


def works(model_type: str, change: Callable[[Any], object], expected: Tensor | None) -> bool:
    """Whether a model can be changed so; it then gives the expected logits."""
    model = build(model_type)
    switchgear.accelerate(model, whole_layers=True)
    try:
        change(model)
    except ValueError:
        return False
    if expected is not None:
        check_close(model, expected)
    return True


def store(model: Any) -> None:
    """In several forms, the last of which has exact products: its logits are those of the rounded weights."""
    for form in ("int8", "int4", "mxfp4"):
        switchgear.store(model, form, linears=form)
        logits = run(model)
        assert logits.isfinite().all()
        switchgear.restore(model)
    check_close(model, logits)


def offload(model: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:  # open files of it remain readable
        switchgear.offload.offload(model, switchgear.offload.write_store(model, f"{folder}/store"), slots=3)


@torch.no_grad()
def run(model: Any) -> Tensor:
    logits: Tensor = model(**example_inputs(model)).logits
    return logits


def check_close(model: Any, expected: Tensor) -> None:
    torch.testing.assert_close(run(model), expected, rtol=0, atol=EXACT * float(expected.abs().max()))


def describe(works: dict[str, bool]) -> str:
    missing = [name for name, does in works.items() if not does]
    if len(missing) > len(works) // 2:
        return ", ".join(name for name, does in works.items() if does)
    return "all but " + ", ".join(missing) if missing else "all"


def write_page() -> str:
    results = json.loads(RESULTS.read_text())
    disk_rate = find_disk_rate(results["models"])
    tried = {kind: try_type(kind) for kind in sorted({fields["model_type"] for fields in MODELS.values()})}
    rows = []
    for name, fields in MODELS.items():
        kind, config = fields["model_type"], plan.config_of(name)
        cost, head = switchgear.analysis.cost(config), count_head(config)
        sizes = ", ".join(f"{count_bytes(cost, head, bits) / 2**30:,.0f}" for bits in FORMS.values())
        speed = (
            predict(name, disk_rate, own_layers=not tried[kind]["whole layers"]) if tried[kind]["offload"] else "none"
        )
        numbers = f"{cost.parameters / 1e9:.1f}, {cost.active / 1e9:.1f}"
        rows.append(f"| {name} | {kind} | {numbers} | {sizes} | {speed} | {describe(tried[kind])} |")
    machine = results["machine"]
    return PAGE.format(
        rows="\n".join(rows), forms=", ".join(FORMS), memory=MEMORY >> 30, memory_rate=PLAIN_READ / 1e9,
        disk_rate=disk_rate / 1e9, machine=f"{machine['cores']} cores of an {machine['model']}",
        names=", ".join(next(iter(tried.values()))),
    )  # fmt: skip


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    Path(sys.argv[1] if len(sys.argv) > 1 else "docs/models.md").write_text(write_page(), encoding="utf-8")
