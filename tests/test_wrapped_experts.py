# SPDX-License-Identifier: BSD-3-Clause
"""Experts in wrappers that pass attributes on to the module inside: the wrapper is no experts module of its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import switchgear
from switchgear.adapters import add_lora
from switchgear.integrations.moe_blocks import moe_blocks
from tiny_models import build, example_inputs


def compiled(experts: nn.Module) -> Any:
    return torch.compile(experts, backend="eager")


def modules_to_save(model: nn.Module) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["experts"]))


def around_each(wrap: Callable[[nn.Module], Any]) -> Callable[[Any], Any]:
    def wrapped(model: Any) -> Any:
        for layer in model.model.layers:
            layer.mlp.experts = wrap(layer.mlp.experts)
        return model

    return wrapped


WRAPPERS = {
    "compile": around_each(compiled),
    "checkpoint": around_each(checkpoint_wrapper),
    "modules_to_save": modules_to_save,
}
STEPS: dict[str, Callable[[Any], Any]] = {
    "accelerate": lambda model: None,
    "store": lambda model: switchgear.store(model, "int8"),
    "add_lora": lambda model: add_lora(model, 2),
}
wrappers = pytest.mark.parametrize("wrapper", WRAPPERS)


def logits(model: Any, inputs: Any) -> Tensor:
    with torch.compiler.set_stance("force_eager"):  # a trace takes a second
        result: Tensor = model(**inputs).logits
    return result


@pytest.mark.parametrize("order", ["wrapper first", "switchgear first"])
@pytest.mark.parametrize("step", STEPS)
@wrappers
def test_the_module_inside_runs_on_switchgear(wrapper: str, step: str, order: str) -> None:
    plain, model = build("mixtral"), build("mixtral")
    inputs = example_inputs(plain)
    switchgear.accelerate(plain)
    STEPS[step](plain)
    if order == "switchgear first":
        switchgear.accelerate(model)
    model = WRAPPERS[wrapper](model)
    replacements = switchgear.accelerate(model)
    assert {(r.class_name, r.path) for r in replacements} == {("MixtralExperts", "moe")}
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    STEPS[step](model)
    got = logits(model, inputs)
    assert torch.equal(got, logits(plain, inputs))
    added = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    added = {name: p for name, p in added.items() if name not in before and "original_module" not in name}
    assert len(added) == (4 * len(plain.model.layers) if step == "add_lora" else 0)
    if added:
        got.sum().backward()
        assert all(parameter.grad is not None for parameter in added.values())


@wrappers
def test_the_block_is_that_around_the_wrapper(wrapper: str) -> None:
    model = WRAPPERS[wrapper](build("mixtral"))
    blocks = moe_blocks(model)
    assert len(blocks) == 4
    for block in blocks.values():
        assert type(block.block).__name__ == "MixtralSparseMoeBlock"
        assert type(block.gate).__name__ == "MixtralTopKRouter"
        assert type(block.experts).__name__ == "MixtralExperts"
