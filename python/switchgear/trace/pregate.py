# SPDX-License-Identifier: BSD-3-Clause
"""Pre-gates: each block's router chooses by the hidden states of the block before (Pre-gated MoE, arXiv:2308.12066).

So the experts of block N+1 are known when block N starts, and are loaded while it computes. The first block keeps a
gate of its own. Parameters and their names do not change: the router of block N+1 is what the paper calls the pre-gate
of block N. A trained model needs fine-tuning afterwards; gradients of the choice reach the block before.
"""

from __future__ import annotations

from torch import nn

from switchgear.integrations.moe_blocks import moe_blocks
from switchgear.routing.router import Handover, Router


def pregate(model: nn.Module, enabled: bool = True) -> list[str]:
    """Makes the routers of a model pre-gates, in place, and returns the names of the blocks that have one: all but the
    first. enabled=False undoes it.

        routing.pregate(model)
        loss = ...(model(x))     # fine-tune
        offload.FromPreGate(model)

    Raises:
        ValueError: fewer than two blocks with routers of switchgear, or blocks of different hidden sizes. Nothing is
            changed.
    """
    blocks = {name: block.gate for name, block in moe_blocks(model).items() if isinstance(block.gate, Router)}
    if len(blocks) < 2 or len(set(map(id, blocks.values()))) < len(blocks):
        raise ValueError(f"model: expected at least two MoE layers with routers of switchgear, got {len(blocks)}")
    sizes = {gate.hidden_size for gate in blocks.values()}
    if len(sizes) > 1:
        raise ValueError(f"model: expected blocks of one hidden size, got {sorted(sizes)}")
    names, gates = list(blocks), list(blocks.values())
    for gate in gates:
        gate.reads_from = gate.passes_to = None
    if enabled:
        for name, before, gate in zip(names[1:], gates, gates[1:], strict=False):
            before.passes_to = gate.reads_from = Handover(name)
    return names[1:]
