# SPDX-License-Identifier: BSD-3-Clause
"""Adapters on every MoE type of transformers, against the model's own code with W + scale · B·A as its weights; merged,
unmerged, saved and loaded by us and by PEFT."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from errors import raises
from switchgear.adapters import add_lora, load_peft, lora_of, merge, remove_lora, save_peft, unmerge
from switchgear.adapters.sites import Site, find_sites
from switchgear.integrations.transformers import accelerate, undo_accelerate
from tiny_configs import MODEL_TYPES
from tiny_models import build, example_inputs

# Gated, transposed with biases, ungated, stacked without a decorator, one linear layer per expert, one matrix for all
# experts, an own gate, and a norm after the experts.
FAST = (
    "mixtral", "gpt_oss", "nemotron_h", "llama4_text", "longcat_flash", "step3p7", "jetmoe", "switch_transformers",
    "nllb-moe", "vitpose_backbone", "dbrx", "inkling2_text", "muse_spark",
)  # fmt: skip
SCALE = 2.0
AMPLIFYING = ("gemma4_text", "muse_spark")  # see test_transformers_models
TIED = "diffusion_gemma"  # its encoder and decoder share weights, so adapters of both are no sum of one weight
TYPES = [
    pytest.param(model_type, marks=[] if model_type in FAST else pytest.mark.slow)
    for model_type in sorted(set(MODEL_TYPES) - {TIED})
]


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)
    result = model(**inputs)
    values = [result] if isinstance(result, Tensor) else [v for v in result.values() if v is not None]
    return values[0] if isinstance(values[0], Tensor) else values[0][0]


def views(model: nn.Module, site: Site) -> list[Tensor]:
    """The matrices [N,C] of a site's parameters in another copy of the model."""
    if site.linears:
        return [model.get_submodule(f"{site.path}.{linear}").weight for linear in site.linears]
    count, rows, cols = site.shape
    parameter = model.get_parameter(site.where)
    if parameter.dim() == 2:
        parameter = parameter.view(count, *((cols, rows) if site.transposed else (rows, cols)))
    return list(parameter.mT if site.transposed else parameter)[:count]


def add_to(plain: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        for site in find_sites(model):
            for weight, a, b in zip(views(plain, site), *site.adapter(), strict=True):
                weight += SCALE * b @ a


def randomised(parameters: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 * parameter.shape[-1] ** -0.5)


def close(got: Tensor, want: Tensor, bound: float) -> None:
    assert (got - want).abs().max() <= bound * want.abs().max()


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.some(6)
def test_model_type(model_type: str, tmp_path: Any) -> None:
    model = build(model_type)
    inputs = example_inputs(model)
    bound = 3e-3 if model_type in AMPLIFYING else 1e-4
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation_internal"):
            module.config._experts_implementation_internal = "eager"
    plain = copy.deepcopy(model)
    accelerate(model)
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = output(model, inputs)
    adapters = add_lora(model, rank=3, alpha=3 * SCALE)
    close(output(model, inputs), before, bound)  # B is zero
    assert set(adapters) == {p for p in model.parameters() if p.requires_grad}
    randomised(adapters)

    add_to(plain, model)
    want, got = output(plain, inputs), output(model, inputs)
    assert (want - before).abs().max() > 1e-3 * want.abs().max()
    close(got, want, bound)
    check_gradients(model, plain, inputs, got, want, 10 * bound)

    with torch.no_grad():
        assert merge(model) == len(adapters) // 2
        close(output(model, inputs), got, bound)
        assert unmerge(model) == len(adapters) // 2
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in bits.items())
    assert torch.equal(output(model, inputs), got)
    saved_and_loaded(model, build(model_type), inputs, got, tmp_path)
    assert remove_lora(model) == len(adapters) // 2
    assert torch.equal(output(model, inputs), before)
    assert model.state_dict().keys() == bits.keys()


def check_gradients(
    model: nn.Module, plain: nn.Module, inputs: dict[str, Any], got: Tensor, want: Tensor, bound: float
) -> None:
    """dA = scale · Bᵀ·dW and dB = scale · dW·Aᵀ, with dW of the model's own code."""
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    plain.requires_grad_(True)
    plain.zero_grad()
    output(plain, inputs).backward(weight)
    output(model, inputs).backward(weight)
    for site in find_sites(model):
        a, b = site.adapter()
        shadow = copy.copy(plain)  # the same modules; only gradients are read
        grads = []
        for e, view in enumerate(views(shadow, site)):
            grads.append(gradient_of(shadow, site, e, view))
        dw = torch.stack(grads)
        if a.grad is None or b.grad is None:
            assert not dw.any(), site.where  # experts of another modality
            continue
        close(a.grad, SCALE * b.detach().mT @ dw, bound)
        close(b.grad, SCALE * dw @ a.detach().mT, bound)


def gradient_of(model: nn.Module, site: Site, e: int, view: Tensor) -> Tensor:
    if site.linears:
        grad = model.get_submodule(f"{site.path}.{site.linears[e]}").weight.grad
        return torch.zeros_like(view) if grad is None else grad
    grad = model.get_parameter(site.where).grad
    if grad is None:
        return torch.zeros_like(view)
    count, rows, cols = site.shape
    if grad.dim() == 2:
        grad = grad.view(count, *((cols, rows) if site.transposed else (rows, cols)))
    return grad[e].mT if site.transposed else grad[e]


def saved_and_loaded(model: nn.Module, other: Any, inputs: dict[str, Any], want: Tensor, path: Any) -> None:
    if type(model).__name__.startswith("Dbrx"):
        with raises(ValueError):
            save_peft(model, path)
        return
    save_peft(model, path)
    replacements = accelerate(other)
    loaded = load_peft(other, path)
    for (name, got), wanted in zip(lora_of(other).items(), lora_of(model).values(), strict=True):
        assert torch.equal(got.a, wanted.a), name
        assert torch.equal(got.b, wanted.b), name
        assert got.options.scale == wanted.options.scale
    assert len(loaded) == 2 * len(lora_of(model))
    assert torch.equal(output(other, inputs), want)
    remove_lora(other)
    undo_accelerate(replacements)
    peft = pytest.importorskip("peft", reason="peft is not installed")
    fresh = copy.deepcopy(other)
    wrapped = loaded_by_peft(peft, other, path)
    if wrapped is None:  # it renames keys of some models with several modalities: those of its own files, too
        peft.get_peft_model(copy.deepcopy(fresh), peft.LoraConfig.from_pretrained(path)).save_pretrained(path)
        assert loaded_by_peft(peft, fresh, path) is None
        return
    close(output(wrapped, inputs), want, 1e-3)


def loaded_by_peft(peft: Any, model: nn.Module, path: Any) -> nn.Module | None:
    """PEFT's model, or None if it misses keys."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped: nn.Module = peft.PeftModel.from_pretrained(model, path)
    return None if any("adapter keys" in str(warning.message) for warning in caught) else wrapped


@pytest.mark.slow
def test_tied_experts_have_adapters_but_cannot_be_merged() -> None:
    model = build(TIED)
    accelerate(model)
    randomised(add_lora(model, 2))
    got = output(model, example_inputs(model))
    with raises(ValueError):
        merge(model)
    assert torch.equal(output(model, example_inputs(model)), got)
