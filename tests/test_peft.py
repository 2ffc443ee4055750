# SPDX-License-Identifier: BSD-3-Clause
"""Adapters of PEFT on experts, added before and after switchgear, against the same adapters without it."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import switchgear
from errors import raises
from switchgear.adapters import wrappers
from switchgear.integrations.transformers import accelerate, path_of, undo_accelerate
from tiny_models import build, example_inputs

peft = pytest.importorskip("peft", reason="peft is not installed")

# model type -> parameters of its experts, and those of one projection
TARGETS = {
    "mixtral": ("experts.gate_up_proj", "experts.down_proj"),
    "gpt_oss": ("experts.gate_up_proj", "experts.down_proj"),
    "llama4_text": ("experts.gate_up_proj", "experts.down_proj"),
    "jetmoe": ("mlp.input_linear.weight", "mlp.output_linear.weight"),
    "longcat_flash": ("experts.gate_up_proj", "experts.down_proj"),
    "step3p7": ("experts.gate_up_proj", "experts.down_proj"),
}
ORDERS = ("adapters first", "switchgear first")


def adapted(model: nn.Module, targets: tuple[str, ...]) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=[], target_parameters=list(targets))
    return peft.get_peft_model(model, config)


def results(model: Any) -> dict[str, Tensor]:
    """The output, and the gradients of all adapters."""
    model.zero_grad()
    logits = next(iter(model(**example_inputs(model.get_base_model())).values()))
    logits.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    return {"logits": logits.detach(), **{name: gradient.clone() for name, gradient in gradients.items()}}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in got:
        difference = (got[name] - want[name]).abs().max() / want[name].abs().max()
        assert difference < 1e-4, name


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("model_type", TARGETS)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.some(10)
def test_adapters_train_as_without_switchgear(model_type: str, order: str, count: int) -> None:
    base = build(model_type)
    targets = TARGETS[model_type][:count]
    want = results(adapted(copy.deepcopy(base), targets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if order == "adapters first":
            model = adapted(base, targets)
            accelerate(model)
        else:
            accelerate(base)
            model = adapted(base, targets)
        assert_close(results(model), want)


def layer_of(model: nn.Module, class_name: str) -> Any:
    return next(module for module in model.modules() if type(module).__name__ == class_name)


@pytest.mark.parametrize(("model_type", "class_name"), [("llama4_text", "Llama4TextMoe"), ("jetmoe", "JetMoeMoE")])
@pytest.mark.parametrize("order", ORDERS)
def test_wrapped_parts_run_on_the_kernels(model_type: str, class_name: str, order: str) -> None:
    """The layer reads the parameters of a part, so it looks into PEFT's wrappers of that part."""
    base = build(model_type)
    replacements = accelerate(base) if order == "switchgear first" else []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = adapted(base, TARGETS[model_type])
        replacements = replacements or accelerate(model)
        assert path_of(layer_of(model, class_name)) == "moe"
        inputs = example_inputs(base)
        got = model(**inputs).logits
        with model.disable_adapter():
            plain = model(**inputs).logits
        assert (got - plain).abs().max() > 1e-2
        merged = model.merge_and_unload()
    assert path_of(layer_of(merged, class_name)) == "moe"
    assert (merged(**inputs).logits - got).abs().max() < 1e-4 * got.abs().max()
    undo_accelerate(replacements)
    assert (merged(**inputs).logits - got).abs().max() < 1e-4 * got.abs().max()


def materialised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of parameters for which PEFT computes W + B·A from now on."""
    names: list[str] = []
    original = nn.utils.parametrize.register_parametrization

    def register(module: nn.Module, name: str, *args: Any, **options: Any) -> nn.Module:
        names.append(name)
        return original(module, name, *args, **options)

    monkeypatch.setattr(nn.utils.parametrize, "register_parametrization", register)
    return names


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("model_type", TARGETS)
def test_no_weight_is_materialised(model_type: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build(model_type)
    inputs = example_inputs(base)
    if order == "switchgear first":
        accelerate(base)
    model = adapted(base, TARGETS[model_type])
    if order == "adapters first":
        accelerate(model)
    else:  # PEFT may have been imported since: the first call notices it
        model(**inputs)
    names = materialised(monkeypatch)
    model(**inputs)
    assert names == []


def test_peft_that_is_imported_later_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = peft.tuners.lora.layer.ParamWrapper
    original = getattr(wrapper._activate_lora, "switchgear_original", wrapper._activate_lora)
    base = build("mixtral")
    accelerate(base)
    model = adapted(base, TARGETS["mixtral"])
    monkeypatch.setattr(wrapper, "_activate_lora", original)
    names, inputs = materialised(monkeypatch), example_inputs(base)
    first = model(**inputs).logits
    assert names
    names.clear()
    assert (model(**inputs).logits - first).abs().max() < 1e-5
    assert not names


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text", "longcat_flash"])
def test_several_adapters_active_disabled_and_merged(model_type: str) -> None:
    base, targets = build(model_type), TARGETS[model_type]
    plain = copy.deepcopy(base)
    models = [adapted(base, targets), adapted(plain, targets)]
    accelerate(base)
    inputs = example_inputs(base)
    states = {"one": ["default"], "other": ["second"], "both": ["default", "second"]}
    for model in models:
        torch.manual_seed(2)
        second = peft.LoraConfig(
            r=3, lora_alpha=5, init_lora_weights=False, target_modules=[], target_parameters=list(targets)
        )
        model.add_adapter("second", second)

    def logits() -> list[Tensor]:
        return [model(**inputs).logits for model in models]

    seen = []
    for active in states.values():
        for model in models:
            model.base_model.set_adapter(active)
        got, want = logits()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert all((got - other).abs().max() > 1e-3 for other in seen)
        seen.append(got)
    for model in models:
        model.merge_adapter()
    torch.testing.assert_close(*logits(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits()[0], seen[-1], rtol=1e-3, atol=1e-4)
    for model in models:
        model.unmerge_adapter()
    torch.testing.assert_close(*logits(), rtol=1e-4, atol=1e-5)
    assert models[0].state_dict().keys() == models[1].state_dict().keys()


def test_modules_of_switchgear_under_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also stored ones, whose weights PEFT could not compute with."""
    torch.manual_seed(0)
    x = torch.randn(9, 64)
    for transposed in (False, True):
        base = nn.Sequential(switchgear.MoE(64, 64, 4, 2, transposed=transposed))
        model = adapted(base, ("experts.gate_up_proj", "experts.down_proj"))
        model(x)  # notices PEFT
        names = materialised(monkeypatch)
        got = model(x)
        assert not names
        got.square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
        switchgear.store(base, "panels")
        torch.testing.assert_close(model(x), got, rtol=1e-4, atol=1e-5)
        switchgear.restore(base)
        torch.testing.assert_close(model(x), got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama4_text", "mixtral", "jetmoe", "switch_transformers"])
def test_saved_adapters(model_type: str, tmp_path: Any) -> None:
    """Saved from a model on switchgear, loaded into one without it, and disabled for a while."""
    base = build(model_type)
    plain = copy.deepcopy(base)
    accelerate(base)
    if model_type == "switch_transformers":
        config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["wi", "wo"])
        model: Any = peft.get_peft_model(base, config)
    else:
        model = adapted(base, TARGETS[model_type])
    inputs = example_inputs(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = model(**inputs).logits
        with model.disable_adapter():
            disabled = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    torch.testing.assert_close(got, loaded(**inputs).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(disabled, plain(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_dropout_on_parameters_is_refused_as_by_peft() -> None:
    base = build("mixtral")
    accelerate(base)
    config = peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=[], target_parameters=list(TARGETS["mixtral"]))
    with raises(ValueError):
        peft.get_peft_model(base, config)


def test_weights_of_another_format_are_left_to_peft() -> None:
    """A sharded weight has other experts than the factors: PEFT says what it does with it."""
    base = build("mixtral")
    accelerate(base)
    model = adapted(base, TARGETS["mixtral"])
    inputs = example_inputs(base)
    model(**inputs)
    experts = next(m for m in base.modules() if type(m).__name__ == "MixtralExperts")

    class Sharded(Tensor):
        pass

    seen: list[str] = []
    parameter = nn.Parameter(experts.down_proj.detach().as_subclass(Sharded))
    experts.register_parameter("down_proj", parameter)
    original = nn.utils.parametrize.register_parametrization
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            nn.utils.parametrize,
            "register_parametrization",
            lambda module, name, *args, **options: (seen.append(name), original(module, name, *args, **options))[1],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(**inputs)
    assert set(seen) == {"down_proj", "gate_up_proj"}
    wrapper = next(m for m in model.modules() if getattr(m, "base_layer", None) is not None and m.base_layer is experts)
    while wrapper.parameter_name != "down_proj":
        wrapper = next(m for m in model.modules() if getattr(m, "base_layer", None) is wrapper)
    assert wrappers._read_factors(wrapper, ["default"]) is None


@pytest.mark.parametrize(("model_type", "target"), [("switch_transformers", "wi"), ("nllb-moe", "fc1")])
def test_wrapped_linears_of_experts_are_called(model_type: str, target: str) -> None:
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=[target])
    model = peft.get_peft_model(build(model_type), config).eval()
    inputs = example_inputs(model.get_base_model())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = model(**inputs).logits
        replacements = accelerate(model)
        assert {r.path for r in replacements} == {f"eager: {target} is a peft Linear, not a Linear"}
        assert torch.equal(model(**inputs).logits, want)


def test_gradient_checkpointing() -> None:
    """Backward runs the wrappers again."""
    results_of = []
    for checkpoints in (False, True):
        base = build("mixtral")
        accelerate(base)
        if checkpoints:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.train()
        results_of.append(results(adapted(base, TARGETS["mixtral"])))
    assert_close(*results_of)


@pytest.mark.parametrize("model_type", ["mixtral", "llama4_text", "jetmoe"])
def test_routers_beside_adapters_are_seen_and_overridden(model_type: str) -> None:
    model = adapted(build(model_type), TARGETS[model_type])
    inputs = example_inputs(model.get_base_model())
    with torch.no_grad(), switchgear.override(model, disable=[0]), switchgear.RoutingTrace(model) as trace:
        model(**inputs)
    assert trace.layers
    for row in trace.summary():
        assert 0 < row.router_entropy <= 1
        assert int(trace.layers[row.name].tokens_per_expert[0]) == 0


def test_adapters_of_stored_linears(tmp_path: Path) -> None:
    """They train, are saved and loaded; a merge, which would need the plain weight, is refused."""
    base: Any = build("mixtral")
    accelerate(base)
    switchgear.store(base, "int8", linears="int4")
    inputs = example_inputs(base)
    stored = base(**inputs).logits
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "o_proj"])
    model = peft.get_peft_model(base, config)
    wanted = results(model)["logits"]
    assert not torch.equal(wanted, stored)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(again(**inputs).logits, wanted)
    with again.disable_adapter():
        assert torch.equal(again(**inputs).logits, stored)
    with pytest.raises(AttributeError, match="restore"):
        again.merge_and_unload()
