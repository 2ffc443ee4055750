# SPDX-License-Identifier: BSD-3-Clause
"""Transposed weights whose inner dimension is contiguous: same values, same bits, other strides."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import switchgear
from errors import raises

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_experts(dtype: torch.dtype = torch.float32, **options: Any) -> switchgear.Experts:
    experts = switchgear.Experts(70, 33, 5, dtype=dtype, **{"transposed": True} | options)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    return experts


def pack(experts: switchgear.Experts) -> switchgear.Experts:
    switchgear.store(experts, "plain")
    return experts


def inputs(dtype: torch.dtype, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.rand(num_tokens, 5).argsort(-1)[:, :2].int()
    return torch.randn(num_tokens, 70).to(dtype), ids, torch.rand(num_tokens, 2)


def projections(experts: nn.Module) -> list[Tensor]:
    return [parameter for parameter in experts.parameters() if parameter.dim() == 3]


def is_packed(experts: nn.Module) -> bool:
    packed = {weight.mT.is_contiguous() for weight in projections(experts)}
    assert packed == {not weight.is_contiguous() for weight in projections(experts)}
    return packed == {True}


def results(experts: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
    """y, and the gradients of x, topk_weights and the parameters."""
    leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_(), *experts.parameters()]
    y = experts(leaves[0], ids, leaves[1])
    grad_y = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"gated": False}, {"interleaved": True}],
    ids=lambda options: "-".join(options) or "gated",
)
def test_same_bits(isa: str, options: dict[str, bool], dtype: torch.dtype) -> None:
    experts = make_experts(dtype, **options)
    packed = pack(copy.deepcopy(experts))
    assert is_packed(packed)
    assert not is_packed(experts)
    for num_tokens in (0, 1, 3, 16, 70, 700):  # all kinds of tiles, and experts with more rows than one product
        x, ids, weights = inputs(dtype, num_tokens)
        with torch.no_grad():
            assert torch.equal(packed(x, ids, weights), experts(x, ids, weights)), num_tokens
        assert all(map(torch.equal, results(packed, x, ids, weights), results(experts, x, ids, weights))), num_tokens


def test_parameters_stay_what_they_are() -> None:
    experts = make_experts(bias=True)
    experts.down_proj.requires_grad_(False)
    before = dict(experts.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    for change, packed in ((pack, True), (switchgear.restore, False)):
        change(experts)
        change(experts)
        assert is_packed(experts) is packed
        assert all(parameter is before[name] for name, parameter in experts.named_parameters())
        assert all(torch.equal(parameter, values[name]) for name, parameter in before.items())
        assert [name for name, parameter in before.items() if not parameter.requires_grad] == ["down_proj"]


def test_state_dict_and_copies(tmp_path: Path) -> None:
    experts, packed = make_experts(bias=True), pack(make_experts(bias=True))
    packed.load_state_dict(experts.state_dict())
    assert is_packed(packed)
    torch.save(packed.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    assert list(state) == list(experts.state_dict())
    assert all(torch.equal(state[name], weight) for name, weight in experts.state_dict().items())
    other = make_experts(bias=True)
    other.load_state_dict(state)
    assert not is_packed(other)

    call = inputs(torch.float32, 9)
    y = experts(*call)
    assert torch.equal(other(*call), y)
    for duplicate in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert is_packed(duplicate)
        assert torch.equal(duplicate(*call), y)
    assert is_packed(packed.to(torch.bfloat16))


def test_safetensors_takes_unpacked_weights() -> None:
    save = pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save
    experts = pack(make_experts())
    with raises(ValueError):
        save(experts.state_dict())
    assert switchgear.restore(experts) == 1
    save(experts.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_training_goes_on(fused: bool) -> None:
    """Also with existing gradients, and with optimizer state unless it is fused."""
    experts, packed = make_experts(), make_experts()
    packed.load_state_dict(experts.state_dict())
    modules = (experts, packed)
    for module in modules:
        module(*inputs(torch.float32, 3)).sum().backward()
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.01, fused=fused) for module in modules]
    for step in range(4):
        if step == (0 if fused else 2):
            pack(packed)
        call = inputs(torch.float32, 20)
        for module, optimizer in zip(modules, optimizers, strict=True):
            optimizer.zero_grad(set_to_none=False)
            module(*call).square().sum().backward()
            optimizer.step()
    assert is_packed(packed)
    for got, expected in zip(packed.parameters(), experts.parameters(), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_inference_mode(made: bool, packed: bool) -> None:
    """Experts are made, and packed, inside or outside of inference mode."""
    with torch.inference_mode(made):
        experts = make_experts()
    with torch.inference_mode(packed):
        assert is_packed(pack(experts))
    if not made:
        results(experts, *inputs(torch.float32, 3))


def test_tied_weights_stay_tied() -> None:
    """One parameter in two modules, and two parameters in the same memory."""
    first, second, third = make_experts(), make_experts(), make_experts()
    second.down_proj = first.down_proj
    third.down_proj.data = first.down_proj.data
    model = nn.ModuleList([first, second, third])
    for change in (lambda model: switchgear.store(model, "plain").modules, switchgear.restore):
        assert change(model) == 3
        assert second.down_proj is first.down_proj
        assert third.down_proj.data_ptr() == first.down_proj.data_ptr()
        assert third.down_proj.stride() == first.down_proj.stride()
        assert len({weight.data_ptr() for weight in projections(model)}) == 4


def test_other_orders_are_left_alone() -> None:
    ordinary = switchgear.MoE(70, 33, 5, 2)
    before = {name: weight.data_ptr() for name, weight in ordinary.named_parameters()}
    assert switchgear.store(ordinary, "plain").modules == 1
    assert switchgear.restore(ordinary) == 0
    assert {name: weight.data_ptr() for name, weight in ordinary.named_parameters()} == before

    one = switchgear.Experts(1, 1, 3, transposed=True)  # each order is both
    pack(one)
    assert switchgear.restore(one) == 0


def test_compiled(backend: str) -> None:
    if backend.startswith(("simt", "cuda")):
        pytest.skip("this order is for the CPU, and weights on other devices are refused")
    experts = make_experts()
    call = inputs(torch.float32, 7)
    compiled = torch.compile(experts, fullgraph=True, backend="eager")
    y = compiled(*call)
    pack(experts)
    torch.testing.assert_close(compiled(*call), y)


def test_errors() -> None:
    mixed = nn.ModuleList([make_experts(), make_experts(device="meta"), nn.Linear(2, 2)])
    with raises(ValueError):
        switchgear.store(mixed, "plain")
    assert mixed[0].down_proj.is_contiguous()

    computed = make_experts()
    parametrize.register_parametrization(computed, "down_proj", nn.Identity())
    with raises(ValueError):
        pack(computed)
    assert computed.gate_up_proj.is_contiguous()


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_another_form_from_packed_weights(form: str) -> None:
    experts = make_experts()
    packed = pack(copy.deepcopy(experts))
    for module in (experts, packed):
        switchgear.store(module, form)
    state = packed.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in experts.state_dict().items())
    assert switchgear.restore(packed) == 1
    assert packed.down_proj.is_contiguous()


def test_a_model_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_local_experts=4, max_position_embeddings=64, pad_token_id=0,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).eval().requires_grad_(False)
    switchgear.accelerate(model)
    prompt = torch.arange(1, 9)[None]
    logits, before = model(prompt).logits, {name: w.clone() for name, w in model.state_dict().items()}
    text = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert switchgear.store(model, "plain").modules == 2
    assert torch.equal(model(prompt).logits, logits)
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), text)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())

    model.save_pretrained(tmp_path)
    loaded = transformers.GptOssForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], w) for name, w in before.items())
    model.set_experts_implementation("eager")  # which also reads any strides
    torch.testing.assert_close(model(prompt).logits, logits)
    assert switchgear.restore(model) == 2  # whichever implementation runs the experts
    model.set_experts_implementation("switchgear")
    assert torch.equal(model(prompt).logits, logits)
