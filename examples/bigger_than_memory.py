# SPDX-License-Identifier: BSD-3-Clause
"""Write text with a model whose experts do not fit in memory: they are in a store on the disk, and a cache holds a
quarter of them. The text is that of the whole model, and each policy hits as often as the simulator said.

    python examples/bigger_than_memory.py [--quick | --checkpoint FOLDER]

The model is that of `switchgear train-tiny`; --quick trains another one for 90 seconds, which is not kept.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear import cli, offload, routing
from switchgear.cli.common import CommandError
from switchgear_bench.tiny import cache
from switchgear_bench.tiny.cache import Tiny

PROMPT, ANSWER = 56, 72  # bytes; the model has learned 128
POLICIES = [policy for policy in offload.POLICIES if not policy.looks_ahead]


class Found(NamedTuple):
    """Of a policy."""

    hits: int
    misses: int
    simulated: int  # hits
    is_equal: bool  # to the text of the whole model


def load(checkpoint: str | None, trained: Path | None) -> Tiny:
    """trained: the folder of a model that is trained now; None: one in the cache, if there is one."""
    if checkpoint:
        return cache.load(checkpoint)
    if trained:
        cli.main(["train-tiny", "--quick", "--out", str(trained)])
        return cache.load(trained)
    try:
        return cache.newest()
    except CommandError:
        cli.main(["train-tiny", "--quick"])
        return cache.newest()


def generate(model: Any, prompt: Tensor) -> Tensor:
    """The likeliest next byte, ANSWER times: [ANSWER]."""
    answer: Tensor = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False
    )
    return answer[0, PROMPT:]


def main(checkpoint: str | None = None, quick: bool = False) -> dict[str, Found]:
    with tempfile.TemporaryDirectory() as folder:
        return run(load(checkpoint, Path(folder) / "tiny" if quick else None), Path(folder) / "experts")


def run(tiny: Tiny, path: Path) -> dict[str, Found]:
    """path: of the store."""
    model = tiny.model()
    prompt = tiny.domains[0].held_out[:PROMPT].long()[None]
    with routing.record(model) as record:
        text = generate(model, prompt)
    print(bytes(prompt[0].tolist() + text.tolist()).decode(errors="replace"), "\n")
    accesses = offload.Accesses.of(record, prompt=PROMPT)
    slots = model.config.num_experts // 4

    found = {}
    print(f"{slots} of {model.config.num_experts} experts of each layer in memory")
    print("policy              hits  misses  simulated hits  MB read  text")
    store = offload.write_store(tiny.folder, path)
    for policy in POLICIES:
        small = offload.load_model(tiny.folder, store)  # without its experts
        with offload.offload(small, store, slots=slots, policy=policy) as handle:
            is_equal = torch.equal(generate(small, prompt), text)
            counts = handle.statistics
        simulated = offload.simulate(accesses, policy, slots=slots).hits
        found[policy.name] = Found(counts.hits, counts.misses, simulated, is_equal)
        print(
            f"{policy.name:18} {counts.hits:5} {counts.misses:7} {simulated:15} {counts.bytes / 1e6:8.1f}  "
            f"{'equal' if is_equal else 'DIFFERS'}"
        )
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", metavar="FOLDER", help="of train-tiny (default: the one in the cache)")
    parser.add_argument("--quick", action="store_true", help="the model that is trained for 90 seconds")
    args = parser.parse_args()
    main(args.checkpoint, args.quick)
