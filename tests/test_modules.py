# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import copy
import inspect
import io
import pickle
import runpy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import switchgear
from errors import raises
from switchgear import backends, routing
from switchgear.experts import Experts
from switchgear.routing import Router, load_balancing_loss, z_loss
from switchgear.routing.router import RouterOptions

VARIANTS: dict[str, dict[str, Any]] = {
    "mixtral": {"normalize": True},
    "deepseek_v3": {
        "score_function": "sigmoid", "normalize": True, "scale": 2.5, "selection_bias": True, "num_groups": 4,
        "topk_groups": 2, "group_score": "top2_sum", "shared_intermediate_size": 10, "float32_router": True,
    },
    "gpt_oss": {
        "activation": "swiglu_oai", "limit": 7.0, "bias": True, "interleaved": True, "transposed": True,
        "router_bias": True,
    },
    "nemotron": {"activation": "relu2", "gated": False, "shared_intermediate_size": 12},
    "switch": {"jitter": 0.01, "activation": "relu", "gated": False},
}  # fmt: skip


def build(variant: str, **changes: Any) -> switchgear.MoE:
    top_k = 1 if variant == "switch" else 3
    return switchgear.MoE(24, 10, 8, top_k, **{**VARIANTS[variant], **changes})


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_backward(backend: str, variant: str) -> None:
    moe = build(variant, return_routing=True).eval()
    x = torch.randn(2, 5, 24, requires_grad=True)
    y, routing = moe(x)
    (y.square().sum() + load_balancing_loss(routing.router_logits, routing.topk_ids)).backward()
    grads = {name: p.grad for name, p in moe.named_parameters()}
    assert y.shape == x.shape
    assert all(grad is not None and grad.isfinite().all() for grad in (x.grad, *grads.values()))

    twin = copy.deepcopy(moe).double()
    for parameter in twin.parameters():
        parameter.grad = None
    x64 = x.detach().double().requires_grad_()
    y64, routing64 = twin(x64)
    (y64.square().sum() + load_balancing_loss(routing64.router_logits, routing64.topk_ids)).backward()
    assert torch.equal(routing.topk_ids, routing64.topk_ids)
    torch.testing.assert_close(y.double(), y64, rtol=1e-4, atol=1e-4)  # a smoke test; test_moe has the bounds
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(grads[name].double(), parameter.grad, rtol=1e-3, atol=1e-3)


def test_state_dict_names() -> None:
    def names(variant: str) -> dict[str, tuple[int, ...]]:
        return {name: tuple(t.shape) for name, t in build(variant).state_dict().items()}

    assert names("mixtral") == {
        "gate.weight": (8, 24), "experts.gate_up_proj": (8, 20, 24), "experts.down_proj": (8, 24, 10),
    }  # fmt: skip
    assert names("deepseek_v3") == {
        **names("mixtral"), "gate.e_score_correction_bias": (8,), "shared_experts.gate_proj.weight": (10, 24),
        "shared_experts.up_proj.weight": (10, 24), "shared_experts.down_proj.weight": (24, 10),
    }  # fmt: skip
    assert names("gpt_oss") == {
        "gate.weight": (8, 24), "gate.bias": (8,),
        "experts.gate_up_proj": (8, 24, 20), "experts.down_proj": (8, 10, 24),
        "experts.gate_up_proj_bias": (8, 20), "experts.down_proj_bias": (8, 24),
    }  # fmt: skip
    assert names("nemotron") == {
        "gate.weight": (8, 24), "experts.up_proj": (8, 10, 24), "experts.down_proj": (8, 24, 10),
        "shared_experts.up_proj.weight": (12, 24), "shared_experts.down_proj.weight": (24, 12),
    }  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_round_trip(variant: str) -> None:
    moe, other, x = build(variant).eval(), build(variant).eval(), torch.randn(4, 24)
    file = io.BytesIO()
    torch.save(moe.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), moe(x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_meta_device(variant: str) -> None:
    moe = build(variant, device="meta", dtype=torch.bfloat16)
    assert all(t.is_meta for t in moe.state_dict().values())
    assert moe(torch.empty(3, 24, device="meta", dtype=torch.bfloat16)).shape == (3, 24)
    moe = moe.to_empty(device="cpu")
    for module in moe.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(t.isfinite().all() for t in moe.state_dict().values())
    assert moe(torch.randn(3, 24).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_activation_checkpointing(backend: str, reentrant: bool) -> None:
    moe = build("deepseek_v3")
    x = torch.randn(6, 24, requires_grad=True)
    plain = torch.autograd.grad(moe(x).square().sum(), [x, *moe.parameters()])
    again = checkpoint(moe, x, use_reentrant=reentrant)
    again.square().sum().backward()
    assert torch.equal(x.grad, plain[0])
    assert all(torch.equal(p.grad, grad) for p, grad in zip(moe.parameters(), plain[1:], strict=True))


def test_functional_call_and_ensembles(backend: str) -> None:
    models = [build("mixtral") for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(5, 24)

    def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    assert torch.equal(torch.func.vmap(run)(parameters, buffers), torch.stack([model(x) for model in models]))


def test_vmap_of_a_layer_with_a_loss_in_training(backend: str) -> None:
    moe = switchgear.MoE(24, 10, 4, 2, balance=[routing.DeviceBalance([0, 0, 1, 1])])
    x = torch.randn(3, 5, 24)

    def loss(x: Tensor) -> Tensor:
        return moe(x).square().mean() + switchgear.balance_loss(moe)

    got = torch.func.vmap(torch.func.grad(loss))(x)
    torch.testing.assert_close(got, torch.stack([torch.func.grad(loss)(rows) for rows in x]))


COUNTING = {
    "Switch": [routing.SwitchLoss],
    "several": [routing.SwitchLoss, routing.LossFreeBias(0.1), partial(routing.AdaptiveSparsity, 2)],
    "Skywork": [partial(routing.SwitchLoss, routing.AdaptiveCoefficient)],
    "over a step": [partial(routing.SwitchLoss, scope="global", accumulate=True)],
}


def test_a_traced_layer_counts_the_tokens_of_its_call() -> None:
    moe = switchgear.MoE(16, 8, 4, 2, balance=[partial(routing.SwitchLoss, 1.0, scope="global", accumulate=True)])
    first, second = torch.randn(2, 5, 16)

    def loss(x: Tensor) -> Tensor:
        moe(x)
        return switchgear.balance_loss(moe)

    with torch.no_grad():
        traced = make_fx(loss)(first)
        switchgear.after_step(moe)
        found = traced(second)
        switchgear.after_step(moe)
        assert torch.equal(found, loss(second))


@pytest.mark.parametrize("transform", ["grad", "vmap", "vmap(grad)", "vmap(vmap)", "ensemble"])
@pytest.mark.parametrize("name", COUNTING)
def test_transforms_count_like_a_loop(name: str, transform: str) -> None:
    moe = switchgear.MoE(24, 10, 4, 2, capacity=routing.Capacity(1.0), balance=COUNTING[name]).double()
    parameters, looped = dict(moe.named_parameters()), copy.deepcopy(moe)
    x = torch.randn(3, 5, 24, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor, moe: switchgear.MoE = moe) -> Tensor:
        y: Tensor = torch.func.functional_call(moe, parameters, (x,))
        return y.square().sum() + switchgear.balance_loss(moe)

    if transform == "grad":
        got = torch.func.grad(loss)(parameters, x[0])["gate.weight"]
        x = x[:1]
    elif transform == "vmap(grad)":
        got = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)["gate.weight"].sum(0)
    elif transform == "ensemble":
        stacked, buffers = torch.func.stack_module_state([moe] * 3)
        torch.func.vmap(lambda *args: torch.func.functional_call(moe, args[:2], args[2]))(stacked, buffers, x)
    else:
        run = torch.func.vmap(torch.func.vmap(moe)) if transform == "vmap(vmap)" else torch.func.vmap(moe)
        run(x[None] if transform == "vmap(vmap)" else x)
    for rows in x:
        loss(dict(looped.named_parameters()), rows, looped).backward()
    if "grad" in transform and not (name == "over a step" and len(x) > 1):  # whose calls see those before
        torch.testing.assert_close(got, looped.gate.weight.grad)
    assert torch.equal(moe.gate.tokens_per_expert, looped.gate.tokens_per_expert)
    switchgear.after_step(moe)
    switchgear.after_step(looped)
    for (key, value), wanted in zip(moe.state_dict().items(), looped.state_dict().values(), strict=True):
        assert torch.equal(value, wanted), key


def test_non_leaf_weights(backend: str) -> None:
    """As under LoRA: each access computes the weight anew, and gradients reach its inputs."""

    class Low(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(8, 20, 2)), nn.Parameter(torch.zeros(8, 2, 24))
            self.accesses = 0

        def forward(self, weight: Tensor) -> Tensor:
            self.accesses += 1
            return weight + self.a @ self.b

    moe, x = build("mixtral"), torch.randn(5, 24)
    before = moe(x)
    nn.utils.parametrize.register_parametrization(moe.experts, "gate_up_proj", adapter := Low())
    adapter.accesses = 0
    after = moe(x)
    assert adapter.accesses == 1
    assert torch.equal(after, before)
    after.sum().backward()
    assert adapter.b.grad.abs().sum() > 0


def test_frozen_experts(backend: str) -> None:
    moe, x = build("mixtral"), torch.randn(5, 24, requires_grad=True)
    moe.experts.requires_grad_(False)
    moe(x).sum().backward()
    assert moe.experts.gate_up_proj.grad is None
    assert moe.gate.weight.grad is not None
    assert x.grad is not None


def test_router_can_be_hooked() -> None:
    moe = build("mixtral")
    seen: list[switchgear.Routing] = []
    moe.gate.register_forward_hook(lambda module, args, output: seen.append(output))
    moe(torch.randn(2, 3, 24))
    (routing,) = seen
    assert routing.router_logits.shape == (6, 8)
    assert routing.router_logits.requires_grad
    assert routing.topk_ids.shape == routing.topk_weights.shape == (6, 3)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_errors_of_transforms_are_not_hidden() -> None:
    """Their tensors have no memory to look at."""
    router, x = Router(24, 8, 1), torch.randn(5, 24)
    with raises(NotImplementedError):
        torch.func.jvp(lambda x: router(x).topk_weights, (x,), (x,))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        with raises(AssertionError):
            router(fake)


def test_jitter_acts_in_training_alone() -> None:
    router, x = Router(24, 8, 1, jitter=0.3), torch.randn(50, 24)
    assert not torch.equal(router(x).router_logits, router(x).router_logits)
    router.eval()
    assert torch.equal(router(x).router_logits, switchgear.gate(x, router.weight))


def test_float32_logits() -> None:
    router = Router(24, 8, 2, float32=True, bias=True, dtype=torch.bfloat16)
    x = torch.randn(5, 24).bfloat16()
    wanted = torch.nn.functional.linear(x.float(), router.weight.float(), router.bias.float())
    with torch.autocast("cpu", torch.bfloat16):
        logits = router(x).router_logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, wanted)
    assert Router(24, 8, 2, dtype=torch.bfloat16)(x).router_logits.dtype == torch.bfloat16


def test_selection_bias_changes_the_choice_and_not_the_weights() -> None:
    router, x = Router(24, 8, 2, score_function="sigmoid", selection_bias=True), torch.randn(20, 24)
    before = router(x)
    router.e_score_correction_bias[5] = 10.0
    after = router(x)
    assert (after.topk_ids[:, 0] == 5).all()
    torch.testing.assert_close(after.topk_weights[:, 0], before.router_logits[:, 5].sigmoid())
    assert router.bfloat16()(x.bfloat16()).topk_ids[0, 0] == 5


def test_autocast(backend: str) -> None:
    moe, x = build("deepseek_v3"), torch.randn(2, 4, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in moe.parameters())


def test_no_tokens(backend: str) -> None:
    moe, x = build("deepseek_v3"), torch.zeros(2, 0, 24, requires_grad=True)
    y = moe(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in moe.parameters())


def test_training_reduces_the_loss(backend: str) -> None:
    moe, x = build("mixtral"), torch.randn(64, 24)
    target = torch.tanh(x @ torch.randn(24, 24) / 5)
    optimizer = torch.optim.AdamW(moe.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = (moe(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


class LearnedSwish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(1.0))

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate * torch.sigmoid(self.beta * gate) * up


def squared_tanh(h: Tensor) -> Tensor:
    return torch.tanh(h).square()


def gate_silu(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


@pytest.mark.parametrize("variant", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_function_as_activation(backend: str, variant: str) -> None:
    """It has the limit, the biases, the layout and the gradients of the activation of that name."""
    named = build(variant, activation="silu")
    own = build(variant, activation=LearnedSwish())
    own.load_state_dict(named.state_dict(), strict=False)
    x = torch.randn(2, 5, 24, requires_grad=True)
    torch.testing.assert_close(own(x), named(x), rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(named(x).square().sum(), [x, *named.parameters()])
    shared = [p for name, p in own.named_parameters() if not name.endswith("beta")]
    got = torch.autograd.grad(own(x).square().sum(), [x, *shared, own.experts.activation.beta])
    torch.testing.assert_close(got[:-1], wanted, rtol=1e-4, atol=1e-5)
    assert got[-1].isfinite()
    assert got[-1] != 0


@pytest.mark.parametrize("gated", [False, True])
def test_function_as_activation_of_any_rows(backend: str, gated: bool) -> None:
    """Of few rows, of experts without tokens, and with empty choices."""
    function = (lambda gate, up: torch.tanh(gate + up)) if gated else squared_tanh
    experts = Experts(24, 10, 4, activation=function, gated=gated)
    x, ids = torch.randn(3, 24), torch.tensor([[0, -1], [-1, -1], [2, 0]], dtype=torch.int32)
    weights = torch.rand(3, 2)
    expected = torch.zeros(3, 24)
    for (t, k), expert in ((tuple(at), ids[tuple(at)].item()) for at in (ids >= 0).nonzero().tolist()):
        h = (experts.gate_up_proj if gated else experts.up_proj)[expert] @ x[t]
        expected[t] += weights[t, k] * (experts.down_proj[expert] @ function(*(h.chunk(2) if gated else (h,))))
    torch.testing.assert_close(experts(x, ids, weights), expected, rtol=1e-4, atol=1e-5)


def test_activation_with_parameters_is_a_submodule() -> None:
    moe, x = build("mixtral", activation=LearnedSwish()), torch.randn(4, 24)
    assert "experts.activation.beta" in moe.state_dict()
    with torch.no_grad():
        moe.experts.activation.beta.fill_(0.5)
    twin, other = copy.deepcopy(moe), build("mixtral", activation=LearnedSwish())
    other.load_state_dict(moe.state_dict())
    plain = pickle.loads(pickle.dumps(build("nemotron", activation=squared_tanh)))
    assert torch.equal(twin(x), moe(x))
    assert torch.equal(other(x), moe(x))
    assert plain.experts.activation is squared_tanh
    assert "squared_tanh" in repr(plain)


@pytest.mark.parametrize("format", ["int4", "panels", "mxfp4"])
def test_function_as_activation_with_stored_weights_and_adapters(format: str) -> None:
    named, own = (
        switchgear.MoE(64, 64, 4, 2, activation=activation, dtype=torch.bfloat16) for activation in ("silu", gate_silu)
    )
    own.load_state_dict(named.state_dict())
    x = torch.randn(6, 64, dtype=torch.bfloat16)
    for moe in (named, own):
        switchgear.store(moe, format)
        torch.manual_seed(0)
        switchgear.adapters.add_lora(moe, rank=4)
        with torch.no_grad():
            for name, parameter in moe.named_parameters():
                if "lora" in name:
                    nn.init.normal_(parameter, std=0.1)
    y, wanted = own(x), named(x)
    torch.testing.assert_close(y, wanted, rtol=5e-2, atol=2e-2)
    y.float().square().sum().backward()
    assert all(p.grad is not None for name, p in own.named_parameters() if "lora" in name)


def test_function_as_activation_in_graphs_and_autocast() -> None:
    moe, x = build("mixtral", activation=LearnedSwish()).eval(), torch.randn(4, 24)
    compiled = torch.compile(moe, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), moe(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert moe(x).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("activation", "error"),
    [
        (lambda gate, up: (gate * up)[:, :1], ValueError),
        (lambda gate, up: None, TypeError),
        (lambda gate, up: gate > up, TypeError),
    ],
)
def test_results_of_a_function_as_activation(activation: Any, error: type[Exception]) -> None:
    with raises(error, "activation"):
        build("mixtral", activation=activation)(torch.randn(4, 24))


@pytest.mark.parametrize("options", [{"activation": 3}, {"activation": gate_silu, "widths": [1, 1, 2, 2, 1, 1, 1, 1]}])
def test_functions_that_are_refused_as_activation(options: dict[str, Any]) -> None:
    with raises(TypeError, "activation"):
        build("mixtral", **options)


def test_repr() -> None:
    text = repr(build("gpt_oss"))
    assert "Experts(24, 10, num_experts=8, swiglu_oai, gated, interleaved, transposed, bias, limit=7.0)" in text
    assert "Router(24, num_experts=8, top_k=3, softmax)" in text


def test_errors() -> None:
    with raises(ValueError, "top_k"):
        Router(24, 8, 9)
    with raises(ValueError):
        Router(24, 8, 2, jitter=1.5)
    with raises(ValueError):
        Experts(24, 10, 8, activation="tanh")
    with raises(ValueError):
        Experts(24, 10, 8, activation="swiglu_oai", gated=False)


# ---- losses --------------------------------------------------------------------------------------------------------


def test_load_balancing_loss_agrees_with_hugging_face() -> None:
    mixtral = pytest.importorskip(
        "transformers.models.mixtral.modeling_mixtral", reason="transformers is not installed"
    )
    layers = tuple(torch.randn(2 * 6, 8) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    logits = torch.cat(layers)
    ids = switchgear.route(logits, 2).topk_ids
    wanted = mixtral.load_balancing_loss_func(layers, 8, 2)
    torch.testing.assert_close(load_balancing_loss(logits, ids), wanted)
    wanted = mixtral.load_balancing_loss_func(layers, 8, 2, mask)
    mask = mask.repeat(3, 1)
    torch.testing.assert_close(load_balancing_loss(logits, ids, mask), wanted)
    padded = logits.masked_fill(mask.reshape(-1, 1) == 0, torch.nan).requires_grad_()
    loss = load_balancing_loss(padded, ids, mask)
    torch.testing.assert_close(loss, wanted)
    assert torch.autograd.grad(loss, padded)[0].isfinite().all()


@pytest.mark.parametrize(
    ("name", "logits", "ids", "mask"),
    [("topk_ids", (10, 8), 5, None), ("attention_mask", (10, 8), 10, 3), ("router_logits", (2, 5, 8), 10, None)],
)
def test_load_balancing_loss_of_other_tokens(name: str, logits: Any, ids: int, mask: int | None) -> None:
    topk_ids = torch.zeros(ids, 2, dtype=torch.int32)
    with raises(ValueError, name):
        load_balancing_loss(torch.zeros(logits), topk_ids, None if mask is None else torch.ones(mask))


def test_score_of_another_number_of_experts() -> None:
    layer = switchgear.MoE(24, 16, 8, 2, score=lambda x, context: x[:, :7])
    with raises(ValueError, "score"):
        layer(torch.randn(5, 24))


def test_balanced_load_gives_top_k() -> None:
    ids = torch.arange(16, dtype=torch.int32).view(8, 2) % 8
    torch.testing.assert_close(load_balancing_loss(torch.zeros(8, 8), ids), torch.tensor(2.0))
    assert load_balancing_loss(torch.zeros(0, 8), ids[:0]) == 0
    logits = torch.randn(3, 8, dtype=torch.bfloat16)
    assert z_loss(logits).dtype == torch.float32
    torch.testing.assert_close(z_loss(torch.zeros(3, 8)), torch.tensor(8.0).log().square())
    assert z_loss(logits[:0]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_z_loss_leaves_out_tokens_without_an_expert(dtype: torch.dtype) -> None:
    """Token 1 has none, token 2 has one."""
    logits = torch.randn(4, 8).to(dtype)
    allowed = torch.arange(8) != 3
    allowed = torch.stack((allowed, allowed & False, ~allowed, allowed))
    masked = logits.masked_fill(~allowed, torch.finfo(dtype).min).requires_grad_()
    loss = z_loss(masked)
    wanted = sum(logits[t, allowed[t]].double().logsumexp(0).square() for t in (0, 2, 3)) / 3
    assert loss.item() == pytest.approx(float(wanted), rel=1e-6)
    loss.backward()
    assert masked.grad.isfinite().all()
    assert masked.grad.any(1).tolist() == [True, False, True, True]
    assert z_loss(masked[1:2]) == 0
    assert z_loss(torch.full((2, 8), torch.nan)).isnan()


# ---- backends ------------------------------------------------------------------------------------------------------


def test_use_backend() -> None:
    before = switchgear.backend()
    with switchgear.use_backend("reference"):
        assert switchgear.backend() == "reference"
        with switchgear.use_backend("native"):
            assert switchgear.backend() == "native"
        assert switchgear.backend() == "reference"
    assert switchgear.backend() == before
    with raises(ValueError, "use_backend"), switchgear.use_backend("cuda"):
        pass
    first, second = switchgear.use_backend("reference"), switchgear.use_backend("reference")  # of two threads
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert switchgear.backend() == "reference"
    second.__exit__(None, None, None)
    assert switchgear.backend() == before


def test_devices_without_kernels_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned_about", set())
    device = torch.device("cuda")
    with switchgear.use_backend("native"):
        with pytest.warns(RuntimeWarning, match="no kernels for cuda"):
            backends.announce_reference(device)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            backends.announce_reference(device)
        monkeypatch.setattr(backends, "_warned_about", set())
        monkeypatch.setenv("SWITCHGEAR_STRICT", "1")
        with raises(RuntimeError):
            backends.announce_reference(device)
    with switchgear.use_backend("reference"):
        backends.announce_reference(device)


def test_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty one counts as unset. A wrong value is named at import."""

    def imported(**environment: str) -> Any:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return runpy.run_path(backends.__file__)

    found = imported(SWITCHGEAR_BACKEND="", SWITCHGEAR_STRICT="")
    assert found["backend"]() == "native"
    assert [imported(SWITCHGEAR_STRICT=value)["_is_strict"]() for value in ("", "0", "1")] == [False, False, True]
    with raises(ValueError, "SWITCHGEAR_STRICT"):
        imported(SWITCHGEAR_STRICT="yes")
    with raises(ValueError, "SWITCHGEAR_BACKEND"):
        imported(SWITCHGEAR_BACKEND="cuda")


def test_isa_is_a_name_from_the_list() -> None:
    assert switchgear.cpu_isa() in switchgear.available_cpu_isas()
    with raises(ValueError):
        switchgear.set_cpu_isa("sse9")


def test_options_of_the_router_are_passed_on() -> None:
    """All that Router has, by their names, but for those that MoE calls otherwise."""
    renamed = {"float32": "float32_router", "bias": "router_bias"}
    parameters = inspect.signature(Router.__init__).parameters
    others = {"self", "hidden_size", "num_experts", "top_k", "device", "dtype", *renamed}
    assert set(RouterOptions.__annotations__) == set(parameters) - others
    moe = switchgear.MoE(8, 4, 4, 2, score_function="sigmoid", jitter=0.1, float32_router=True, router_bias=True)
    assert (moe.gate.score_function, moe.gate.jitter, moe.gate.float32) == ("sigmoid", 0.1, True)
    assert moe.gate.bias is not None
    with raises(TypeError, "temperature"):
        switchgear.MoE(8, 4, 4, 2, temperature=2.0)  # type: ignore[call-arg]
