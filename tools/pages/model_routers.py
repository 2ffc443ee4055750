# SPDX-License-Identifier: BSD-3-Clause
"""Writes docs/model_routers.md: what can be seen and changed of the routers of every MoE type of transformers.

PYTHONPATH=tests python tools/pages/model_routers.py [path]
"""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from switchgear.integrations.moe_blocks import MoeBlock, moe_blocks
from switchgear.integrations.routers import (
    LookupMethod,
    SparseMixerMethod,
    TopKMethod,
    find_routing_method,
    is_looked_up,
)
from switchgear.routing import override, record, replay
from switchgear.trace import RoutingTrace
from tiny_configs import MODEL_TYPES
from tiny_models import BARE, build, example_inputs

PAGE = """# Routers of Hugging Face models

What [tracing.md](tracing.md) does to the routers of every model type of transformers {transformers}, tried on a tiny
random model in float32, in transformers' own code.

- **selection**: how the router's choice is made anew: the score, groups, and what happens to the weights. It is
  verified on each router when `override` or `replay` begins: with random weights and tokens it must give the router's
  own choice and weights, else it is refused.
- **override**: the largest max |logits - the model's| / max |the model's| of these types, with an `override` that
  changes nothing. An expert that is disabled gets no token. Gemma 4, its diffusion and Muse Spark amplify one ulp of
  their embeddings.
- **replay**: whether a step has the recorded choices, bit by bit, after all routers' weights have moved.

{counts}

This page is generated: `PYTHONPATH=tests python tools/pages/model_routers.py docs/model_routers.md`

| selection | model types | override | replay |
|---|---|---:|---|
{rows}

{refused}
"""


def selection_of(block: MoeBlock) -> str:
    """The routing method of a router in words. Raises ValueError if it has none."""
    method: Any = find_routing_method(block)
    if is_looked_up(block):
        return f"by token id, {_in_words(method)}"
    return _in_words(method)


def _in_words(method: Any) -> str:
    if isinstance(method, SparseMixerMethod):
        return "SparseMixer"
    if isinstance(method, LookupMethod):
        return _in_words(method.inner)
    assert isinstance(method, TopKMethod)
    words = [method.weight if method.weight != "logits" else "softmax over the chosen"]
    if method.score_function == "logits" and method.weight == "sigmoid":
        words.append("chosen by logits")
    if method.block.selection_bias() is not None:
        words.append("bias")
    groups = method.block.groups()
    if method.group_score and groups is not None:
        words.append(f"groups by {method.group_score}")
    words += [word for word, holds in (("normalised", method.normalize), ("scaled", method.scaled)) if holds]
    ends = {"divided by top_k": method.by_top_k, "scaled per expert": method.learned is not None}
    return ", ".join([*words, *(word for word, holds in ends.items() if holds)])


@dataclass(frozen=True)
class Found:
    """What works with the routers of a model type. `refused` says why they have no `selection`."""

    model_type: str
    selection: str = ""
    refused: str = ""
    entropy: bool = False
    difference: float = math.nan  # infinite if an expert that is disabled gets tokens
    replay: str = "no"


def try_type(model_type: str) -> Found:
    """Builds a model and runs all of it."""
    model = build(model_type)
    blocks = moe_blocks(model)
    if not blocks or model_type in BARE:
        return Found(model_type, refused="no router")
    _fill(blocks)
    inputs = example_inputs(model)
    with RoutingTrace(model) as trace:
        plain = _output(model, inputs)
    entropy = all(math.isfinite(layer.router_entropy) for layer in trace.summary())
    try:
        selections = " / ".join(dict.fromkeys(selection_of(block) for block in blocks.values()))
        overridden = _overridden(model, inputs, plain)
    except ValueError as error:
        return Found(model_type, refused=_reason(error), entropy=entropy)
    return Found(model_type, selections, "", entropy, overridden, _replayed(model, inputs, blocks))


def _fill(blocks: dict[str, MoeBlock]) -> None:
    """Gives routers distinct logits, and values to what new models have as zeros."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in blocks.values():
            gate: Any = block.gate
            for parameter in gate.parameters():
                if parameter.dim() == 2:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2 * parameter.shape[1] ** -0.5)
            if (bias := block.selection_bias(flat=False)) is not None:
                bias.copy_(torch.randn(bias.shape, generator=generator) * 0.05)
            if is_looked_up(block):
                keys = torch.rand(len(gate.tid2eid), block.num_experts, generator=generator)
                gate.tid2eid.copy_(keys.topk(gate.top_k).indices)


def _overridden(model: nn.Module, inputs: dict[str, Any], plain: Tensor) -> float:
    with override(model, gain={0: 1.0}):
        difference = float((_output(model, inputs) - plain).abs().max() / plain.abs().max())
    with override(model, disable=[0]), RoutingTrace(model) as trace:
        _output(model, inputs)
    obeyed = all(int(layer.tokens_per_expert[0]) == 0 for layer in trace.layers.values())
    return difference if obeyed else math.inf


def _replayed(model: nn.Module, inputs: dict[str, Any], blocks: dict[str, MoeBlock]) -> str:
    try:
        with record(model) as choices:
            _output(model, inputs)
        torch.manual_seed(7)
        with torch.no_grad():
            for block in blocks.values():
                assert block.gate is not None
                for parameter in block.gate.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter) * parameter.abs().mean())
        with replay(model, choices), record(model) as again:
            _output(model, inputs)
    except ValueError as error:
        return f"no, {_reason(error)}"
    want, got = ({name: layer.topk_ids() for name, layer in r.layers.items()} for r in (choices, again))
    return "yes" if all(torch.equal(got[name], want[name]) for name in want) else "no"


def _output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**inputs)
    values = output.values() if hasattr(output, "values") else output
    return next(value for value in values if isinstance(value, Tensor))


def _reason(error: ValueError) -> str:
    return str(error).partition(": ")[2].partition(" on 64")[0]


def table() -> str:
    """The page's text. Takes a minute."""
    found = []
    for model_type in MODEL_TYPES:
        found.append(try_type(model_type))
        print(f"{len(found):3} {model_type}", file=sys.stderr)
    groups: dict[str, list[Found]] = {}
    for one in found:
        if one.selection:
            groups.setdefault(one.selection, []).append(one)
    entropy, overridden = sum(one.entropy for one in found), sum(one.difference < 1e-3 for one in found)
    replayed = sum(one.replay == "yes" for one in found)
    counts = (
        f"Of {len(found)} types, {entropy} have an entropy in `RoutingTrace`, {overridden} an `override`, {replayed} a "
        "replay."
    )
    rows = "\n".join(_row(*group) for group in sorted(groups.items()))
    refused = "\n".join(f"- {one.model_type}: {one.refused}" for one in found if one.refused)
    return PAGE.format(transformers=transformers.__version__, counts=counts, rows=rows, refused=refused)


def _row(selection: str, group: list[Found]) -> str:
    names = ", ".join(one.model_type for one in group)
    replays = ["yes" if len(group) > 1 else "", *(f"{o.model_type} {o.replay}" for o in group if o.replay != "yes")]
    replay = "; ".join(filter(None, replays)) or "yes"
    return f"| {selection} | {names} | {max(one.difference for one in group):.1e} | {replay} |"


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)  # deprecations inside transformers' models
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    Path(sys.argv[1] if len(sys.argv) > 1 else "docs/model_routers.md").write_text(table(), encoding="utf-8")
