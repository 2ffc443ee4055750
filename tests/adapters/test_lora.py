# SPDX-License-Identifier: BSD-3-Clause
"""add_lora, lora_of, remove_lora on modules of switchgear, and what they refuse."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import switchgear
from errors import raises
from switchgear.adapters import add_lora, lora_of, merge, remove_lora, unmerge
from switchgear.integrations.transformers import accelerate, undo_accelerate
from switchgear.layers import MergedExperts
from tiny_models import build, example_inputs

HIDDEN, INNER, EXPERTS = 64, 32, 4


def layer(**options: Any) -> switchgear.MoE:
    torch.manual_seed(0)
    return switchgear.MoE(HIDDEN, INNER, EXPERTS, 2, **options)


def model() -> nn.Module:
    return nn.Sequential(layer(), nn.Linear(HIDDEN, HIDDEN), layer(gated=False, transposed=True, bias=True))


def tokens() -> Tensor:
    return torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(3))


def randomised(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    torch.manual_seed(1)
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.2)
    return parameters


def state_of(module: nn.Module) -> list[Any]:
    """All that add_lora may change."""
    named = [(name, id(p), p.requires_grad) for name, p in module.named_parameters()]
    attributes = [(name, sorted(vars(m))) for name, m in module.named_modules()]
    hooks = [(name, len(m._forward_pre_hooks)) for name, m in module.named_modules()]
    return [named, attributes, hooks]


def test_a_whole_model() -> None:
    net = model()
    before = net(tokens())
    adapters = add_lora(net, rank=np.int64(3), alpha=6)
    torch.testing.assert_close(net(tokens()), before, rtol=1e-5, atol=1e-6)
    found = lora_of(net)
    assert list(found) == ["0.experts.gate_up_proj", "0.experts.down_proj", "2.experts.up_proj", "2.experts.down_proj"]
    assert [p for adapter in found.values() for p in adapter[:2]] == adapters
    assert found["0.experts.gate_up_proj"].a.shape == (EXPERTS, 3, HIDDEN)
    assert found["2.experts.up_proj"].b.shape == (EXPERTS, INNER, 3)  # the same for a transposed projection
    assert found["0.experts.down_proj"].options.scale == 2.0
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {
        f"{name}_lora_{letter}" for name in found for letter in "AB"
    }
    randomised(adapters)
    net(tokens()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapters)
    assert all(p.grad is None for p in net.parameters() if not p.requires_grad)
    assert remove_lora(net) == 4
    assert torch.equal(net(tokens()), before)
    assert lora_of(net) == {}
    assert remove_lora(net) == 0


@pytest.mark.parametrize("targets", ["down_proj", ["down_proj"], ["gate_up_proj"], ["up_proj", "down_proj"]])
def test_targets(targets: Any) -> None:
    net = model()
    add_lora(net, 2, targets=targets)
    wanted = {
        "gate_up_proj": {"0.experts.gate_up_proj", "2.experts.up_proj"},
        "down_proj": {"0.experts.down_proj", "2.experts.down_proj"},
        "up_proj": {"2.experts.up_proj"},
    }
    names = [targets] if isinstance(targets, str) else targets
    assert set(lora_of(net)) == set().union(*(wanted[name] for name in names))
    randomised([p for adapter in lora_of(net).values() for p in adapter[:2]])
    y = net(tokens())
    with torch.no_grad():
        merge(net)
        torch.testing.assert_close(net(tokens()), y, rtol=1e-4, atol=1e-5)


def test_further_projections_later_keep_the_first_adapters_trainable() -> None:
    net = layer()
    first = add_lora(net, 2, targets=["gate_up_proj"])
    second = add_lora(net, 3, targets=["down_proj"], dropout=0.1)
    assert all(p.requires_grad for p in first + second)
    assert [a.options.rank for a in lora_of(net).values()] == [2, 3]


def test_only_the_experts_leave_the_rest_trainable() -> None:
    net = layer()
    add_lora(net.experts, 2)
    assert net.gate.weight.requires_grad
    assert not net.experts.down_proj.requires_grad


def test_dropout_acts_in_train_mode_only() -> None:
    net, x = layer(), tokens()
    randomised(add_lora(net, 4, dropout=0.5))
    net.eval()
    assert torch.equal(net(x), net(x))
    want = net(x).detach()
    net.train()
    torch.manual_seed(0)
    first = net(x)
    assert not torch.equal(first, net(x))
    torch.manual_seed(0)
    assert torch.equal(first, net(x))
    torch.manual_seed(0)
    many = torch.stack([net(x).detach() for _ in range(400)])
    # Down's input is a nonlinear function of the dropped one, so only the first projection's part is unbiased: few
    # per cent remain.
    assert (many.mean(0) - want).norm() < 0.2 * (first - want).norm() + 0.1 * want.norm()
    assert (first - want).abs().max() > 0.01 * want.abs().max()


def test_copies_and_state_dicts() -> None:
    net = layer()
    randomised(add_lora(net, 2))
    y = net(tokens())
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(tokens()), y)
        assert remove_lora(twin) == 2
    other = layer()
    add_lora(other, 2)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(tokens()), y)


def test_another_dtype_of_adapters() -> None:
    """Master adapters in float32 beside bfloat16 weights, as PEFT has them."""
    net = layer(dtype=torch.bfloat16)
    adapters = randomised(add_lora(net, 2, dtype=torch.float32))
    net(tokens().bfloat16()).float().square().sum().backward()
    assert all(p.dtype is torch.float32 and p.grad is not None and p.grad.any() for p in adapters)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("rank", 0, ValueError),
        ("rank", 2.0, TypeError),
        ("alpha", float("nan"), ValueError),
        ("alpha", "8", TypeError),
        ("dropout", 1.0, ValueError),
        ("targets", ["q_proj"], ValueError),
        ("targets", [], ValueError),
        ("targets", 3, TypeError),
        ("targets", [3], TypeError),
        ("dtype", torch.int8, TypeError),
        ("dtype", "float32", TypeError),
    ],
)
def test_bad_options(argument: str, value: Any, error: type[Exception]) -> None:
    net = model()
    before = state_of(net)
    with pytest.raises(error, match=rf"^{argument}: "):
        add_lora(net, **{"rank": 2, argument: value})
    assert state_of(net) == before


def test_bad_models() -> None:
    for call in (lambda m: add_lora(m, 2), remove_lora, lora_of, merge):
        with raises(TypeError, "model"):
            call({})
    with raises(ValueError, "model"):
        add_lora(nn.Linear(2, 2), 2)
    half = model()
    add_lora(half[2], 2)
    before = state_of(half)
    with raises(ValueError):
        add_lora(half, 2)
    assert state_of(half) == before


def test_experts_that_another_layer_reads() -> None:
    experts = switchgear.Experts(HIDDEN, INNER, EXPERTS)
    merged = MergedExperts(switchgear.Router(HIDDEN, EXPERTS, 2), experts)
    add_lora(experts, 2)
    with raises(ValueError, "experts"):
        merged(torch.randn(2, 3, HIDDEN))


# ---- Hugging Face models ---------------------------------------------------------------------------------------------


def test_a_model_that_is_not_accelerated() -> None:
    net = build("mixtral")
    before = state_of(net)
    with raises(ValueError):
        add_lora(net, 2)
    assert state_of(net) == before


@pytest.mark.parametrize("model_type", ["mixtral", "llama4_text", "step3p7", "switch_transformers", "dbrx"])
def test_adapters_are_never_bypassed(model_type: str) -> None:
    net = build(model_type)
    inputs = example_inputs(net)
    replacements = accelerate(net)
    add_lora(net, 2)
    net(**inputs)
    undo_accelerate(replacements)
    with raises(RuntimeError):
        net(**inputs)
    accelerate(net)
    net(**inputs)
    remove_lora(net)
    undo_accelerate(accelerate(net))
    net(**inputs)


def test_a_hooked_part_does_not_bypass_adapters() -> None:
    net = build("llama4_text")
    accelerate(net)
    add_lora(net, 2)
    part = next(m for m in net.modules() if type(m).__name__ == "Llama4TextExperts")
    handle = part.register_forward_hook(lambda *_: None)
    with raises(RuntimeError):
        net(**example_inputs(net))
    handle.remove()
    net(**example_inputs(net))


@pytest.mark.parametrize("form", ["int8", "int4", "mxfp4"])
@pytest.mark.parametrize("order", ["adapters first", "stored first"])
def test_stored_hugging_face_experts(form: str, order: str) -> None:
    net = build("mixtral")
    accelerate(net)
    inputs = example_inputs(net)
    if order == "stored first":
        switchgear.store(net, form)
    adapters = randomised(add_lora(net, 2))
    if order == "adapters first":
        switchgear.store(net, form)
    net(**inputs).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapters)
    with raises(ValueError):
        merge(net)
    switchgear.restore(net)
    y = net(**inputs).logits
    merge(net)
    torch.testing.assert_close(net(**inputs).logits, y, rtol=1e-3, atol=1e-4)
    with raises(ValueError):
        remove_lora(net)
    unmerge(net)
    torch.testing.assert_close(net(**inputs).logits, y, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["adapters first", "stored first"])
def test_float32_adapters_of_a_stored_model_of_16_bits(order: str, dtype: torch.dtype) -> None:
    """The usual QLoRA. Their steps are float32; y is that of adapters in the dtype of the activations."""
    net, x = layer().to(dtype), tokens().to(dtype)
    if order == "stored first":
        switchgear.store(net, "int4")
    adapters = randomised(add_lora(net, 2, dtype=torch.float32))
    if order == "adapters first":
        switchgear.store(net, "int4")
    y = net(x)
    y.square().mean().backward()
    assert y.dtype is dtype
    assert all(p.grad is not None and p.grad.dtype is torch.float32 and p.grad.any() for p in adapters)
    assert torch.equal(net.to(dtype)(x), y)


@pytest.mark.parametrize("targets", [{"target_modules": ["1"]}, {"target_parameters": ["experts.down_proj"]}])
def test_peft_refuses_a_model_with_adapters(targets: dict[str, Any]) -> None:
    """It would freeze them, and its files would lack them."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    net = model()
    trained = add_lora(net, 2)
    names = [name for name, _ in net.named_parameters()]
    config = peft.LoraConfig(r=2, **{"target_modules": [], **targets})
    with raises(ValueError):
        peft.get_peft_model(net, config)
    assert [name for name, _ in net.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in trained)
    remove_lora(net)
    peft.get_peft_model(net, config)


def test_adapters_after_those_of_peft() -> None:
    """Both train if only the experts are passed, also beside a further adapter of PEFT."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    net = nn.Sequential(layer(), nn.Linear(HIDDEN, HIDDEN))
    config = peft.LoraConfig(r=2, target_modules=["1"])
    wrapped = peft.get_peft_model(net, config)
    add_lora(net[0].experts, 2)
    trained = randomised([parameter for parameter in wrapped.parameters() if parameter.requires_grad])
    wrapped.add_adapter("second", config)
    wrapped(tokens()).square().sum().backward()
    assert len(trained) == 6
    assert all(p.grad is not None and p.grad.any() for p in trained)


def test_a_model_wrapped_by_peft_is_refused() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    net = build("mixtral")
    accelerate(net)
    targets = ["experts.gate_up_proj"]
    wrapped = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=[], target_parameters=targets))
    before = state_of(wrapped)
    with raises(ValueError):
        add_lora(wrapped, 2)
    assert state_of(wrapped) == before
