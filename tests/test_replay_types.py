# SPDX-License-Identifier: BSD-3-Clause
"""A replayed step has the recorded choices in every Hugging Face model type, after the weights moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from errors import raises
from model_types import sampled
from switchgear.routing import record, replay
from test_override_types import TYPES, prepared

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from switchgear.integrations.moe_blocks import moe_blocks  # noqa: E402
from tiny_models import example_inputs  # noqa: E402

NOT_REPLAYED = {
    "diffusion_gemma": "model.decoder.layers.0.experts",  # its decoder denoises a canvas of its own
    "switch_transformers": "model",
}
DECODERS = [t for t in TYPES if t not in NOT_REPLAYED]


def ids_of(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    with torch.no_grad(), record(model) as result:
        model(**inputs)
    return {name: layer.topk_ids() for name, layer in result.layers.items()}


@pytest.mark.parametrize("model_type", sampled(DECODERS))
def test_choices_are_bit_equal_after_the_weights_moved(model_type: str) -> None:
    model = prepared(model_type)
    inputs = example_inputs(model)
    torch.manual_seed(0)
    with record(model) as choices, torch.no_grad():
        model(**inputs)
    layers = {block.layer for block in moe_blocks(model).values() if "vision" not in block.name}  # no image, no call
    assert {name.partition("#")[0] for name in choices.layers} == layers
    want = {name: layer.topk_ids() for name, layer in choices.layers.items()}
    with torch.no_grad():
        for block in moe_blocks(model).values():
            assert block.gate is not None
            for parameter in block.gate.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter) * parameter.abs().mean())
    free = ids_of(model, inputs)
    if model_type != "deepseek_v4":  # half of its layers look experts up, and its others follow
        assert any(not torch.equal(free[name], want[name]) for name in want)
    for parameter in model.parameters():
        parameter.requires_grad_()
    with replay(model, choices):
        got = ids_of(model, inputs)
        torch.manual_seed(0)
        output = model(**inputs)
    assert all(torch.equal(got[name], want[name]) for name in want)
    values = output.values() if hasattr(output, "values") else output
    first = next(v for v in values if isinstance(v, Tensor) and v.requires_grad)
    first.float().square().mean().backward()
    weights = [w for b in moe_blocks(model).values() if (w := b.gate_weight()) is not None]
    assert not weights or any(w.grad is not None and bool(w.grad.any()) for w in weights)


@pytest.mark.parametrize("model_type", NOT_REPLAYED)
def test_other_models_are_refused(model_type: str) -> None:
    model = prepared(model_type)
    with torch.no_grad(), raises(ValueError, NOT_REPLAYED[model_type]), record(model):
        model(**example_inputs(model))
