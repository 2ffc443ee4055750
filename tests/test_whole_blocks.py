# SPDX-License-Identifier: BSD-3-Clause
"""Blocks of Hugging Face models as a whole: the results of their modules, and their modules where these are needed."""

from __future__ import annotations

import functools
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed")

import switchgear
from switchgear.integrations import whole_blocks
from switchgear.integrations.transformers import accelerate, undo_accelerate
from tiny_models import build, example_inputs

TYPES = ("olmoe", "qwen3_moe", "mixtral")


@pytest.fixture(params=TYPES)
def model(request: pytest.FixtureRequest) -> Any:
    built = build(request.param).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return built


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The inputs of blocks that ran as a whole."""
    seen: list[Any] = []
    real = whole_blocks._run_whole

    def spied(block: Any, *args: Any, **kwargs: Any) -> Any:
        y = real(block, *args, **kwargs)
        if y is not None:
            seen.append(block)
        return y

    monkeypatch.setattr(whole_blocks, "_run_whole", spied)
    return seen


def output(model: Any) -> Tensor:
    return model(**example_inputs(model)).logits


def blocks_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if whole_blocks.find_block_class(module) is not None]


@torch.no_grad()
def test_results_are_those_of_the_modules(model: Any, calls: list[Any]) -> None:
    replaced = accelerate(model)
    want = output(model)
    undo_accelerate(replaced)
    accelerate(model, whole_blocks=True)
    got = output(model)
    assert len(calls) == len(blocks_of(model)) > 0
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_block_in_bfloat16(model: Any, calls: list[Any]) -> None:
    """The weights are rounded as the router rounds them; sums differ by a few roundings."""
    model.to(torch.bfloat16)
    accelerate(model, whole_blocks=True)
    block = blocks_of(model)[0]
    x = torch.randn(2, 5, block.gate.hidden_dim, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = block(x)
    want = type(block).forward(block, x)
    assert len(calls) == 1
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 2.0**-6 * want.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_does_not_depend_on_its_batch(model: Any, calls: list[Any], isa: str, dtype: torch.dtype) -> None:
    """The bits of 120 tokens together and alone. The modules fail this: torch computes the router's product."""
    accelerate(model.to(dtype), whole_blocks=True)
    block = blocks_of(model)[0]
    x = torch.randn(1, 120, block.gate.hidden_dim).to(dtype)
    together, alone = block(x), torch.cat([block(x[:, token : token + 1]) for token in range(120)], 1)
    assert len(calls) == 121
    assert torch.equal(together, alone)


@torch.no_grad()
def test_generate(model: Any, calls: list[Any]) -> None:
    if model.generation_config is None:
        pytest.skip("this model does not generate")
    inputs = {"input_ids": torch.tensor([[1, 5, 7]])}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    replaced = accelerate(model)
    want = model.generate(**inputs, **options)
    undo_accelerate(replaced)
    accelerate(model, whole_blocks=True)
    assert torch.equal(model.generate(**inputs, **options), want)
    assert len(calls) == 6 * len(blocks_of(model))


def test_gradients_take_the_modules(model: Any, calls: list[Any]) -> None:
    accelerate(model, whole_blocks=True)
    output(model).sum().backward()
    assert not calls
    assert all(parameter.grad is not None for block in blocks_of(model) for parameter in block.parameters())


@torch.no_grad()
def test_hooks_and_replaced_forwards_take_the_modules(model: Any, calls: list[Any]) -> None:
    accelerate(model, whole_blocks=True)
    first, *others = blocks_of(model)
    seen: list[Any] = []
    for part in (first.gate, first.experts):
        handle = part.register_forward_hook(lambda *args: seen.append(args))
        output(model)
        assert len(seen) == 1
        assert calls == others
        handle.remove()
        seen.clear()
        calls.clear()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    output(model)
    handle.remove()
    assert type(first.gate) in seen
    assert not calls
    first.gate.forward = first.gate.forward
    output(model)
    assert calls == others


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "after"])
def test_forwards_replaced_on_a_class_take_the_modules(
    model: Any, calls: list[Any], when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = blocks_of(model)[0]
    for cls in (type(block), type(block.gate), type(block.experts)):
        own, seen = cls.forward, []

        def patched(self: Any, *args: Any, own: Any = own, seen: list[Any] = seen) -> Any:
            seen.append(self)
            return own(self, *args)

        for replacement in (patched, functools.wraps(own)(patched)):
            with monkeypatch.context() as patch:
                if when == "before":
                    patch.setattr(cls, "forward", replacement)
                replaced = accelerate(model, whole_blocks=True)
                patch.setattr(cls, "forward", replacement)
                output(model)
            assert len(seen) > 0
            assert not calls
            seen.clear()
            if when == "after":
                output(model)
                assert len(calls) > 0
                calls.clear()
            undo_accelerate(replaced)


@torch.no_grad()
def test_a_loaded_model_joins_its_blocks_again(model: Any, calls: list[Any]) -> None:
    accelerate(model, whole_blocks=True)
    want = output(model)
    calls.clear()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    replaced = accelerate(loaded, whole_blocks=True)
    assert torch.equal(output(loaded), want)
    assert calls == blocks_of(loaded)
    undo_accelerate(replaced)
    assert all("forward" not in vars(module) for module in loaded.modules())


@torch.no_grad()
def test_traces_and_router_logits_are_complete(model: Any) -> None:
    accelerate(model, whole_blocks=True)
    with switchgear.RoutingTrace(model) as trace:
        output(model)
    assert len(trace.layers) == len(blocks_of(model))
    found = model(**example_inputs(model), output_router_logits=True).router_logits
    assert len(found) == len(blocks_of(model))


@torch.no_grad()
def test_other_implementations_are_not_bypassed(model: Any, calls: list[Any]) -> None:
    accelerate(model, whole_blocks=True)
    model.set_experts_implementation("eager")
    output(model)
    assert not calls


@torch.no_grad()
def test_stored_weights(model: Any, calls: list[Any]) -> None:
    model.to(torch.bfloat16)
    accelerate(model, whole_blocks=True)
    switchgear.store(model, "int8")
    block = blocks_of(model)[0]
    x = torch.randn(1, 5, block.gate.hidden_dim, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = block(x)
    assert len(calls) == 1
    want = type(block).forward(block, x)
    assert (got - want).abs().max() <= 2.0**-6 * want.abs().max()


@torch.no_grad()
def test_restore(model: Any, calls: list[Any]) -> None:
    want = output(model)
    replaced = accelerate(model, whole_blocks=True)
    assert [r.path for r in replaced].count("whole block") == len(blocks_of(model))
    undo_accelerate(replaced)
    assert torch.equal(output(model), want)
    assert not calls
    assert all("forward" not in vars(module) for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("order", [("hook", "join"), ("join", "hook")])
def test_hooks_of_accelerate_stay_on_a_block(model: Any, calls: list[Any], order: tuple[str, str]) -> None:
    hooks = pytest.importorskip("accelerate", reason="accelerate is not installed").hooks

    class Half(hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output / 2

    block = blocks_of(model)[0]
    x = torch.randn(1, 5, block.gate.hidden_dim, generator=torch.Generator().manual_seed(1))
    want = block(x)
    replaced = []
    for event in order:
        if event == "hook":
            hooks.add_hook_to_module(block, Half())
        else:
            replaced = accelerate(model, whole_blocks=True)
    torch.testing.assert_close(2 * block(x), want, rtol=1e-4, atol=1e-5)
    assert len(calls) == 1
    undo_accelerate(replaced)
    assert torch.equal(2 * block(x), want)
    hooks.remove_hook_from_module(block)
    assert torch.equal(block(x), want)
    assert len(calls) == 1


@torch.no_grad()
def test_other_dtypes_and_devices_take_the_modules(model: Any, calls: list[Any]) -> None:
    accelerate(model, whole_blocks=True)
    block = blocks_of(model)[0]
    block.gate.to(torch.float64)
    x = torch.randn(1, 3, block.gate.hidden_dim)
    with pytest.raises(RuntimeError):  # of the router's own product
        block(x)
    block.gate.float()
    with torch.autocast("cpu", torch.bfloat16):
        block(x)
    assert not calls
