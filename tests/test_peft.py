# SPDX-License-Identifier: BSD-3-Clause
"""Adapters of PEFT on experts, added before and after switchgear, against the same adapters without it."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from switchgear import backends
from switchgear.integrations.tiny_models import build, example_inputs
from switchgear.integrations.transformers import accelerate, path_of, restore

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


def llama4_experts(model: nn.Module) -> Any:
    return next(module for module in model.modules() if type(module).__name__ == "Llama4TextMoe")


@pytest.mark.parametrize("order", ORDERS)
def test_wrapped_experts_run_the_models_own_code_with_a_warning(order: str) -> None:
    base = build("llama4_text")
    backends._warned_about.clear()
    replacements = accelerate(base) if order == "switchgear first" else []
    model = adapted(base, TARGETS["llama4_text"])
    replacements = replacements or accelerate(model)
    reason = "experts is a peft ParamWrapper, not a Llama4TextExperts"
    assert path_of(llama4_experts(model)) == f"eager: {reason}"
    if order == "adapters first":
        assert {replacement.path for replacement in replacements} == {f"eager: {reason}"}
    with pytest.warns(UserWarning, match=f"Llama4TextMoe keeps its own implementation: {reason}"):
        results(model)
    merged = model.merge_and_unload()
    assert path_of(llama4_experts(merged)) == "moe"
    inputs = example_inputs(merged)
    got = merged(**inputs).logits
    restore(replacements)
    want = merged(**inputs).logits
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_wrapped_linears_of_jetmoe_run_by_themselves() -> None:
    """The layer as a whole cannot be fused around adapters, but its linears can run on the kernels."""
    model = adapted(build("jetmoe"), TARGETS["jetmoe"])
    paths = {(r.class_name, r.path.partition(":")[0]) for r in accelerate(model)}
    assert paths == {("JetMoeMoE", "eager"), ("JetMoeParallelExperts", "grouped_gemm")}
    merged = model.merge_and_unload()
    assert {path_of(module) for module in merged.modules() if type(module).__name__ == "JetMoeMoE"} == {"moe"}


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
