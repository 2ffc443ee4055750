# SPDX-License-Identifier: BSD-3-Clause
"""The drop-in for Hugging Face transformers. test_transformers_models.py compares every model type."""

import copy
import importlib.util
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ExpertsInterface

from errors import raises
from switchgear import backends, functional
from switchgear.integrations import is_too_old
from switchgear.integrations.transformers import accelerate, is_decorated, path_of
from switchgear.integrations.undecorated import find_patch
from test_gates import Swish
from tiny_models import build, example_inputs

BFLOAT16 = torch.finfo(torch.bfloat16).eps
_IS_ONE_GRAPH = torch.__version__ >= "2.13"  # whether torch.compile goes through the attributes of a module


def experts_of(model: nn.Module) -> Any:
    """The first decorated experts module, on switchgear."""
    accelerate(model)
    return next(module for module in model.modules() if is_decorated(module))


def eager(module: Any, *args: Any) -> Any:
    """The result of transformers' own loop over the experts."""
    return type(module).forward.__wrapped__(module, *args)


def choices(module: Any, num_tokens: int = 8, top_k: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Hidden states, ids and weights; the weights do not sum to 1."""
    generator = torch.Generator().manual_seed(0)
    weight = module.gate_up_proj if module.has_gate else module.up_proj
    width = weight.shape[1 if module.is_transposed else 2]
    x = torch.randn(num_tokens, width, generator=generator).to(dtype)
    topk_weights, topk_ids = torch.rand(num_tokens, module.num_experts, generator=generator).topk(top_k, dim=-1)
    return x, topk_ids, topk_weights.to(dtype)


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max())


# ---- selecting it ----------------------------------------------------------------------------------------------------


def test_name_is_registered() -> None:
    assert "switchgear" in ExpertsInterface().valid_keys()
    model = build("mixtral")
    model.set_experts_implementation("switchgear")
    assert path_of(model.model.layers[0].mlp.experts) == "moe"
    model.set_experts_implementation("eager")
    assert path_of(model.model.layers[0].mlp.experts).startswith("not replaced: experts_implementation is 'eager'")


@pytest.mark.parametrize(("model_type", "warns"), [("llama4_text", True), ("dbrx", True), ("mixtral", False)])
def test_a_model_that_ignores_the_name_warns(model_type: str, warns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(model_type)
    for choose in (
        lambda: model.set_experts_implementation("switchgear"),
        lambda: AutoModelForCausalLM.from_config(model.config, experts_implementation="switchgear"),
    ):
        monkeypatch.setattr(backends, "_warned_about", set())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            choose()
        found = [str(w.message) for w in caught if "switchgear.accelerate(model)" in str(w.message)]
        assert len(found) == warns
        assert all(model_type.partition("_")[0] in message for message in found)


def test_fp8_experts_are_refused_with_advice() -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="no FP8 experts in this version")
    function = fp8.FP8ExpertsInterface()["switchgear"]
    with raises(NotImplementedError):
        function(nn.Module(), None, None, None)


def test_from_pretrained(tmp_path: Any) -> None:
    build("mixtral").save_pretrained(tmp_path)
    want = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    got = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="switchgear")
    assert path_of(got.model.layers[0].mlp.experts) == "moe"
    inputs = example_inputs(got)
    torch.testing.assert_close(got(**inputs).logits, want(**inputs).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "path"),
    [
        ("mixtral", "moe"), ("olmoe", "moe"), ("qwen3_moe", "moe"), ("deepseek_v3", "moe"), ("gpt_oss", "moe"),
        ("nemotron_h", "moe"), ("aria", "moe"), ("deepseek_v4", "moe"), ("openai_privacy_filter", "moe"),
        ("muse_spark", "grouped_gemm"), ("inkling2_text", "grouped_gemm"), ("llama4_text", "moe"),
        ("dbrx", "grouped_gemm"), ("switch_transformers", "grouped_gemm"), ("nllb-moe", "grouped_gemm"),
    ],
)  # fmt: skip
def test_path(model_type: str, path: str) -> None:
    assert {replacement.path for replacement in accelerate(build(model_type))} == {path}


def test_learnt_activation() -> None:
    """At the start it is silu, which has a kernel."""
    module = experts_of(build("qwen3_moe"))
    module.act_fn = Swish()
    beta, arguments = module.act_fn.beta, choices(module)
    for value in (1.0, 3.0):
        with torch.no_grad():
            beta.fill_(value)
        got, want = module(*arguments), eager(module, *arguments)
        assert relative(got, want) < 1e-5
        assert relative(*(torch.autograd.grad(y.square().sum(), beta)[0] for y in (got, want))) < 1e-5


@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama4_text", "longcat_flash"])
def test_hooks_on_the_activation_after_a_forward(model_type: str) -> None:
    model = build(model_type)
    accelerated, inputs = copy.deepcopy(model), example_inputs(model)
    accelerate(accelerated)
    accelerated(**inputs)
    for changed in (model, accelerated):
        for module in changed.modules():
            if type(module).__name__.endswith("Experts"):
                module.act_fn.register_forward_hook(lambda module, args, output: output / 2)
    assert relative(accelerated(**inputs).logits, model(**inputs).logits) < 1e-5


# ---- what the function honours ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "inkling2_text", "nemotron_h"])
def test_sentinels_are_empty_slots(model_type: str) -> None:
    module = experts_of(build(model_type))
    x, topk_ids, topk_weights = choices(module)
    topk_weights.requires_grad_()
    sentinels = torch.zeros_like(topk_ids, dtype=torch.bool)
    sentinels[0] = sentinels[3:5, 1] = True  # one token has only sentinels
    y = module(x, topk_ids.masked_fill(sentinels, module.num_experts), topk_weights)
    (grad,) = torch.autograd.grad(y.square().sum(), topk_weights)
    want = eager(module, x, topk_ids, topk_weights.masked_fill(sentinels, 0))
    assert relative(y, want) < 1e-5
    assert not y[0].any()
    assert not grad[sentinels].any()
    assert grad[~sentinels].all()


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "muse_spark"])
def test_no_tokens(model_type: str) -> None:
    module = experts_of(build(model_type))
    x, topk_ids, topk_weights = choices(module, num_tokens=0)
    y = module(x.requires_grad_(), topk_ids, topk_weights)
    assert y.shape == x.shape
    y.sum().backward()
    grads = [parameter.grad for parameter in module.parameters(recurse=False)]
    assert all(grad is not None and not grad.any() for grad in grads)


@pytest.mark.parametrize("router_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "inkling2_text", "muse_spark"])
@pytest.mark.some(4)
def test_bfloat16(model_type: str, router_dtype: torch.dtype) -> None:
    module = experts_of(build(model_type)).bfloat16()
    x, topk_ids, topk_weights = choices(module, dtype=torch.bfloat16)
    y = module(x, topk_ids, topk_weights.to(router_dtype))
    want = eager(copy.deepcopy(module).double(), x.double(), topk_ids, topk_weights.double())
    assert y.dtype == torch.bfloat16
    # Roundings: h, the gate's value, each expert's output, a norm if there is one, and y. Each is half an ulp, but an
    # error in h reaches y through the gate's slope, about 1.
    assert relative(y, want) < 5 * BFLOAT16


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss"])
def test_experts_in_another_dtype(model_type: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """As in transformers' default: computed in the dtype of the experts, returned in that of the hidden states."""
    module = experts_of(build(model_type)).to(dtypes[1])
    for parameter in module.parameters():
        parameter.data.copy_(0.5 * torch.randn(parameter.shape))  # what is drawn in 16 bits depends on torch's version
    x, *others = choices(module, dtype=dtypes[0])
    x.requires_grad_()
    got = module(x, *others)
    want = ExpertsInterface()["grouped_mm"](module, x, *others)
    assert got.dtype == want.dtype == dtypes[0]
    assert relative(got, want) < 4 * BFLOAT16
    exact = eager(copy.deepcopy(module).double(), x.detach().double(), *others)
    assert relative(got, exact) < 4 * BFLOAT16
    found = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in (got, want)]
    assert relative(*found) < 8 * BFLOAT16


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "inkling2_text", "muse_spark"])
def test_autocast(model_type: str) -> None:
    module = experts_of(build(model_type))
    x, topk_ids, topk_weights = choices(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x.requires_grad_(), topk_ids, topk_weights)
    assert y.dtype == torch.float32  # as in transformers: the hidden states' dtype
    assert relative(y, eager(module, x, topk_ids, topk_weights)) < 5 * BFLOAT16
    y.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in (x, module.down_proj))


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "aria"])
def test_weights_are_not_copied(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = experts_of(build(model_type))
    weights: list[Tensor] = []
    moe = functional.moe

    def keep(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weights.extend(args[:2])
        return moe(x, *args, **kwargs)

    monkeypatch.setattr(functional, "moe", keep)
    module(*choices(module))
    assert [weight.data_ptr() for weight in weights] == [module.gate_up_proj.data_ptr(), module.down_proj.data_ptr()]


class LowRank(nn.Module):
    """W + B·A, like LoRA on stacked experts. Counts how often the weight is computed."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        experts, rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(experts, 2, columns) * 0.1)
        self.b = nn.Parameter(torch.randn(experts, rows, 2) * 0.1)
        self.count = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.count += 1
        return weight + self.b @ self.a


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "inkling2_text"])
def test_parametrised_weights(model_type: str) -> None:
    module = experts_of(build(model_type))
    for name in ("gate_up_proj", "down_proj"):
        nn.utils.parametrize.register_parametrization(module, name, LowRank(getattr(module, name)))
        module.parametrizations[name].original.requires_grad_(False)
    parametrizations = [module.parametrizations[name][0] for name in ("gate_up_proj", "down_proj")]
    arguments = choices(module)
    for parametrization in parametrizations:
        parametrization.count = 0
    y = module(*arguments)
    assert [parametrization.count for parametrization in parametrizations] == [1, 1]
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad and parameter.dim() == 3]
    want = eager(module, *arguments)
    assert relative(y, want) < 1e-5
    assert len(trained) == 4
    for parameter in trained:
        assert relative(*(torch.autograd.grad(out.sum(), parameter, retain_graph=True)[0] for out in (y, want))) < 1e-5


def test_peft_lora() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(
        r=2,
        init_lora_weights=False,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    base = build("mixtral")
    model = peft.get_peft_model(base, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inputs = example_inputs(base)

    def run(implementation: str) -> list[Tensor]:
        base.set_experts_implementation(implementation)
        logits = model(**inputs).logits
        return [logits, *torch.autograd.grad(logits.sum(), trained)]

    assert len(trained) == 16  # A and B of two weights in four layers
    for got, want in zip(run("switchgear"), run("eager"), strict=True):
        assert relative(got, want) < 1e-5


class Quantised(Tensor):
    """Stands in for a tensor subclass of a quantisation library."""


def test_tensor_subclasses_keep_the_models_own_loop() -> None:
    module = experts_of(build("mixtral"))
    arguments = choices(module)
    want = eager(module, *arguments)
    module.down_proj = nn.Parameter(module.down_proj.detach().as_subclass(Quantised))
    assert path_of(module) == "eager: a weight is a Quantised, not a plain tensor"
    with pytest.warns(UserWarning, match="MixtralExperts keeps its own implementation: a weight is a Quantised"):
        y = module(*arguments)
    torch.testing.assert_close(y.as_subclass(Tensor), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(*arguments)  # the warning is issued only once


# ---- the model around it ---------------------------------------------------------------------------------------------


def test_generate() -> None:
    model = build("mixtral")
    inputs = example_inputs(model)
    want = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    model.set_experts_implementation("switchgear")
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), want)


def test_checkpointing_with_router_loss() -> None:
    def losses(implementation: str) -> tuple[float, float, Tensor]:
        model = build("mixtral").train()
        model.set_experts_implementation(implementation)
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        inputs = example_inputs(model)
        output = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
        output.loss.backward()
        return output.loss.item(), output.aux_loss.item(), model.model.layers[0].mlp.experts.down_proj.grad

    want, got = losses("eager"), losses("switchgear")
    assert got[:2] == pytest.approx(want[:2], rel=1e-6)
    assert relative(got[2], want[2]) < 1e-5


@pytest.mark.parametrize("model_type", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
@pytest.mark.some(1)
def test_compile_without_a_graph_break(model_type: str) -> None:
    """The model runs compiled before it ran eagerly, so its gate is recognised while tracing."""
    torch._dynamo.reset()
    model = build(model_type)
    want = model(**example_inputs(model)).logits
    accelerate(model)
    got = torch.compile(model, fullgraph=_IS_ONE_GRAPH, backend="aot_eager")(**example_inputs(model)).logits
    assert relative(got, want) < 1e-5
    parameter = experts_of(model).down_proj
    assert relative(*(torch.autograd.grad(y.sum(), parameter)[0] for y in (got, want))) < 1e-4


@pytest.mark.parametrize(
    "model_type",
    [
        "inkling2_text", "muse_spark", "llama4_text", "dbrx", "switch_transformers", "nllb-moe", "longcat_flash",
        "step3p7", "vitpose_backbone",
    ],
)  # fmt: skip
def test_compile_one_layer_of_experts(model_type: str) -> None:
    torch._dynamo.reset()
    model = build(model_type)
    module: Any = model.get_submodule(accelerate(model)[-1].name)
    patch = find_patch(module)
    arguments = choices(module) if patch is None else patch.sample(module, torch.Generator().manual_seed(0))
    compiled = torch.compile(module, fullgraph=_IS_ONE_GRAPH, backend="aot_eager")
    got, want = (run(*arguments) for run in (compiled, module))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "gemma4_text", "llama4_text", "longcat_flash"])
@pytest.mark.some(2)
def test_layers_compiled_one_by_one_share_a_graph(model_type: str) -> None:
    """More layers than torch.compile has recompilations; another value of the gate makes another graph."""
    if not _IS_ONE_GRAPH:
        pytest.skip("this torch cannot trace the attributes of a module")
    torch._dynamo.reset()
    model = build(model_type)
    first: Any = model.get_submodule(accelerate(model)[-1].name)
    patch = find_patch(first)
    arguments = choices(first) if patch is None else patch.sample(first, torch.Generator().manual_seed(0))
    counter = CompileCounter()
    for layer in [first, *(copy.deepcopy(first) for _ in range(9))]:
        nn.init.normal_(layer.down_proj if hasattr(layer, "down_proj") else layer.experts.down_proj)
        want = layer(*arguments)
        layer.compile(backend=counter, fullgraph=True)
        torch.testing.assert_close(layer(*arguments), want, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    if model_type == "gpt_oss":
        first.limit = 0.05
        torch.testing.assert_close(first(*arguments), eager(first, *arguments), rtol=1e-5, atol=1e-5)
        assert counter.frame_count == 2


def test_export() -> None:
    model = build("mixtral")
    model.set_experts_implementation("switchgear")
    inputs = example_inputs(model)
    program = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False)
    assert "switchgear.moe_forward" in str(program.graph)
    torch.testing.assert_close(program.module()(**inputs, use_cache=False).logits, model(**inputs).logits)


def test_functional_call() -> None:
    model = build("mixtral")
    model.set_experts_implementation("switchgear")
    doubled = {name: 2 * parameter.detach() for name, parameter in model.named_parameters() if "experts" in name}
    inputs = example_inputs(model)
    got = torch.func.functional_call(model, doubled, kwargs=inputs, args=()).logits
    model.load_state_dict(doubled, strict=False)
    torch.testing.assert_close(got, model(**inputs).logits)


def test_meta_device() -> None:
    with torch.device("meta"):
        model = build("mixtral")
        accelerate(model)
        ids = torch.zeros(2, 12, dtype=torch.long)
    assert model(ids).logits.shape == (2, 12, 256)
    with torch.device("meta"):
        assert len(accelerate(build("llama4_text"))) == 4  # the swap cannot be tried on meta, so it is accepted


def test_a_release_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is registered, in a copy of the module."""
    monkeypatch.setattr("transformers.__version__", "5.19.0")
    spec = importlib.util.find_spec("switchgear.integrations.transformers")
    assert spec is not None
    assert spec.loader is not None
    with raises(ImportError):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("4.57.1", True),
        ("5.9.0", True),
        ("5.19.3.dev0", True),
        ("5.20.0rc1", False),
        ("6.0", False),
        ("unknown version", False),
    ],
)
def test_versions_that_are_too_old(version: str, expected: bool) -> None:
    assert is_too_old(version) == expected
