# SPDX-License-Identifier: BSD-3-Clause
"""What other libraries and users do with stored experts: it works, or the message says what to call."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import switchgear
from errors import raises
from switchgear import backends
from switchgear.adapters import add_lora, lora, sites
from switchgear.integrations.transformers import accelerate, path_of, undo_accelerate
from switchgear.weights import stored_of
from tiny_models import build, example_inputs


@pytest.fixture(autouse=True)
def _first_warning() -> None:
    backends._warned_about.clear()


def stored_model(model_type: str = "mixtral", form: str = "int8") -> Any:
    model = build(model_type)
    accelerate(model)
    switchgear.store(model, form)
    return model


# ---- readers of the plain parameter ----------------------------------------------------------------------------------

MESSAGE = r"_proj is stored as int8, which only switchgear reads: call switchgear.restore\(model\)"


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_another_experts_implementation(model_type: str, implementation: str) -> None:
    model = stored_model(model_type)
    model.set_experts_implementation(implementation)
    with torch.no_grad(), pytest.raises(AttributeError, match=MESSAGE):
        model(**example_inputs(model))
    switchgear.restore(model)
    model(**example_inputs(model))


def test_a_hook_of_the_activation_that_comes_after() -> None:
    """The gate runs between two products then, and what needs the fused kernel says so."""
    model = stored_model(form="fp8")
    inputs, experts = example_inputs(model), model.model.layers[0].mlp.experts
    with torch.no_grad():
        want = model(**inputs).logits
        hook = experts.act_fn.register_forward_hook(lambda *_: None)
        assert path_of(experts) == "grouped_gemm"
        torch.testing.assert_close(model(**inputs).logits, want)
        with raises(ValueError):
            switchgear.finetune.freeze_except(model, {"model.layers.0.mlp.experts": [0]})
        hook.remove()
        assert path_of(experts) == "moe"
        switchgear.restore(model)


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w.shape, lambda w: w[0], lambda w: len(w), lambda w: w + 1, lambda w: 2 * w, lambda w: list(w),
        lambda w: torch.matmul(torch.ones(2), w), lambda w: torch.nn.functional.linear(torch.ones(2), w),
        lambda w: torch.stack([w]), lambda w: torch.ones(2) @ w, lambda w: nn.init.zeros_(w),
    ],
)  # fmt: skip
def test_any_use_of_an_absent_weight(use: Any) -> None:
    experts = switchgear.Experts(64, 64, 2)
    switchgear.store(experts, "int8")
    for module in (experts, copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        with pytest.raises(AttributeError, match=MESSAGE):
            use(module.down_proj)
        assert "is stored as int8" in repr(module.down_proj)
    switchgear.restore(experts)
    assert type(experts.down_proj) is nn.Parameter
    assert "down_proj" not in vars(experts)


def peft_config(count: int = 2) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    targets = ["experts.down_proj", "experts.gate_up_proj"][:count]
    return peft.LoraConfig(r=2, init_lora_weights=False, target_modules=[], target_parameters=targets)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])  # [E,out,in] and [E,in,out]
def test_adapters_of_peft_on_stored_weights(model_type: str, tmp_path: Path) -> None:
    """The first one, one beside others, and one that is loaded: the names and the bits of adapters that came before."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    models = []
    for stored_first in (False, True):
        base = build(model_type)
        accelerate(base)
        if stored_first:
            switchgear.store(base, "int8")
        torch.manual_seed(1)
        model = peft.get_peft_model(base, peft_config())
        if not stored_first:
            model.add_adapter("second", peft_config())
            switchgear.store(base, "int8")
        models.append(model)
    before, after = models
    before.save_pretrained(tmp_path)
    torch.manual_seed(1)
    after.add_adapter("second", peft_config())
    after.load_adapter(tmp_path / "second", "second")
    names = {name for name, _ in before.named_parameters()}
    assert {name for name, _ in after.named_parameters()} == names
    inputs = example_inputs(before.get_base_model())
    for adapter in ("default", "second"):
        for model in models:
            model.set_adapter(adapter)
        assert torch.equal(after(**inputs).logits, before(**inputs).logits)
    experts = next(module for module in after.modules() if stored_of(module) is not None)
    with pytest.raises(AttributeError, match=MESSAGE):
        len(experts.down_proj)


def test_adapters_of_peft_on_experts_of_switchgear() -> None:
    """They are found in a model without transformers, if PEFT was imported before the model was stored."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = nn.Sequential(switchgear.MoE(64, 64, 4, 2))
    switchgear.store(model, "int4")
    wrapped = peft.get_peft_model(model, peft_config())
    wrapped(torch.randn(3, 64)).square().sum().backward()
    gradients = [parameter.grad for parameter in wrapped.parameters() if parameter.requires_grad]
    assert len(gradients) == 4
    assert all(gradient is not None and gradient.any() for gradient in gradients)


def test_a_module_to_save_stays_stored() -> None:
    """PEFT copies it beside the original, and the copy is as complete."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = build("mixtral")
    accelerate(base)
    switchgear.store(base, "int8")
    inputs = example_inputs(base)
    want = base(**inputs).logits
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["experts"]))
    assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("nested", [1, 2])
@pytest.mark.parametrize("form", ["mxfp4", "int8"])
def test_storing_weights_under_adapters(nested: int, form: str) -> None:
    """PEFT's wrappers lend their factors, so only switchgear reads the weights, in any form."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = build("mixtral")
    accelerate(base)
    model = peft.get_peft_model(base, peft_config(nested))
    inputs = example_inputs(base)
    assert switchgear.store(model, form).modules == 4
    got = model(**inputs).logits
    got.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    with raises(AttributeError):
        model.merge_adapter()
    switchgear.restore(model)
    want = model(**inputs).logits
    bound = 1e-4 if form == "mxfp4" else 0.5  # int8 rounds activations, so some tokens choose another expert
    assert (got - want).norm() < bound * want.norm()
    model.merge_adapter()


def test_adapters_beside_stored_experts_train() -> None:
    """Adapters of the attention of a model with stored experts: the usual way to fine-tune a quantised model."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = build("mixtral").requires_grad_(False)
    accelerate(base)
    switchgear.store(base, "int8")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**example_inputs(base)).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


# ---- training --------------------------------------------------------------------------------------------------------


def call(model: nn.Module) -> None:
    model(torch.randn(4, 64))


def test_training_a_stored_model_warns_once() -> None:
    model = switchgear.MoE(64, 64, 4, 2)
    switchgear.store(model, "int8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(model.eval())
        with torch.no_grad():
            call(model.train())
    with pytest.warns(UserWarning, match=r"Experts is in training mode, but its experts are stored as int8") as caught:
        call(model)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(model)


@pytest.mark.parametrize("way_out", ["frozen", "adapters"])
def test_no_warning_where_experts_are_not_meant_to_train(way_out: str) -> None:
    model = switchgear.MoE(64, 64, 4, 2)
    if way_out == "frozen":
        model.experts.requires_grad_(False)
    switchgear.store(model, "int8")
    if way_out == "adapters":
        add_lora(model.experts, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(model.train())


# ---- messages --------------------------------------------------------------------------------------------------------


def test_add_lora_changes_nothing_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = switchgear.Experts(64, 64, 2)
    calls = []

    def run_out(*args: Any, **options: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 6:  # three for each projection: the last one's B
            raise MemoryError
        return sites.allocate(*args, **options)

    monkeypatch.setattr(lora, "allocate", run_out)
    with pytest.raises(MemoryError):
        add_lora(experts, 2)
    assert [name for name, _ in experts.named_parameters()] == ["gate_up_proj", "down_proj"]
    assert all(parameter.requires_grad for parameter in experts.parameters())


def test_storing_without_accelerate() -> None:
    model = build("mixtral")
    model.set_experts_implementation("eager")
    with raises(ValueError):
        switchgear.store(model, "int8")
    with raises(ValueError):
        switchgear.store(build("llama4_text"), "int8")
    swapped = build("llama4_text")
    accelerate(swapped)
    with raises(ValueError):
        switchgear.store(swapped, "int8")
    muse = build("muse_spark")
    accelerate(muse)
    with raises(ValueError):
        switchgear.store(muse, "int8")
    with raises(ValueError):
        switchgear.store(nn.Linear(2, 2), "int8")


def test_storing_offloaded_experts() -> None:
    hooks = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = build("mixtral")
    accelerate(model)
    hooks.cpu_offload(model, execution_device="cpu")
    with raises(ValueError):
        switchgear.store(model, "int8")


class Packed(Tensor):
    """Stands in for a weight of torchao: a subclass with few operations."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.mT.__get__:  # type: ignore[attr-defined]
            raise NotImplementedError("no transpose")
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4_text"])
def test_formats_of_other_libraries_that_cannot_be_transposed(model_type: str) -> None:
    from switchgear.integrations.transformers import path_of

    model = build(model_type)
    replacement = accelerate(model)[0]
    module: Any = model.get_submodule(replacement.name)
    experts = getattr(module, "experts", module)
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach().as_subclass(Packed), requires_grad=False)
    assert path_of(module).startswith("eager: ")
    with torch.no_grad(), pytest.warns(UserWarning, match="keeps its own implementation"):
        model(**example_inputs(model))


@pytest.mark.parametrize("stored_first", [True, False])
def test_linears_run_stored_with_accelerate(stored_first: bool) -> None:
    """Stored linear layers run the same, whichever of store and accelerate(linears=True) comes first."""
    model, twin = build("olmoe"), build("olmoe")
    inputs = example_inputs(model)
    accelerate(twin)
    switchgear.store(twin, "int4", linears="int8")
    if stored_first:
        accelerate(model)
        switchgear.store(model, "int4", linears="int8")
    done = accelerate(model, linears=True)
    if not stored_first:
        switchgear.store(model, "int4", linears="int8")
    undo_accelerate(accelerate(twin, linears=True))
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.allclose(logits, twin(**inputs).logits, atol=1e-4)
    undo_accelerate(done)
    accelerate(model)
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, logits, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        switchgear.restore(model)
    plain = build("olmoe")
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
