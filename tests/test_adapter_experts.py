# SPDX-License-Identifier: BSD-3-Clause
"""LoRAExperts and mixtures of adapters in a model: all or nothing, undo, state dicts, copies, and errors by name."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import switchgear
from errors import raises
from switchgear import presets
from switchgear.adapters import (
    Adapter,
    LoRAExperts,
    LowRank,
    LowRankExperts,
    Mixture,
    add_lora_experts,
    mixture,
    train_gate,
)
from switchgear.routing import FromEmbedding, PosthocGate

H, I, E = 16, 24, 8  # noqa: E741


class Model(nn.Module):
    """Two blocks with Linear layers, the second of which ties a layer of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(2):
            self.blocks.append(nn.ModuleDict({"up": nn.Linear(H, I), "down": nn.Linear(I, H), "norm": nn.LayerNorm(H)}))
        self.blocks[1]["down"] = self.blocks[0]["down"]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["norm"](x + block["down"](F.silu(block["up"](x))))
        return x


SIZES = {"blocks.0.up": (H, I), "blocks.0.down": (I, H), "blocks.1.up": (H, I)}


def low_rank(size_in: int, size_out: int, rank: int, alpha: float = 4.0) -> LowRank:
    return LowRank(torch.randn(rank, size_in), torch.randn(size_out, rank), alpha)


def adapter_of(rank: int) -> Adapter:
    return Adapter({name: low_rank(*sizes, rank) for name, sizes in SIZES.items()})


def snapshot(model: nn.Module) -> list[Any]:
    """Everything that an error must leave as it was."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)]
    return [modules, [(name, id(p), p.requires_grad, p.clone()) for name, p in model.named_parameters()]]


def assert_untouched(model: nn.Module, before: list[Any]) -> None:
    modules, parameters = snapshot(model)
    assert modules == before[0]
    assert [p[:3] for p in parameters] == [p[:3] for p in before[1]]
    assert all(torch.equal(p[3], q[3]) for p, q in zip(parameters, before[1], strict=True))


# ---- low-rank experts ------------------------------------------------------------------------------------------------


def random_choices(tokens: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Some choices are empty."""
    ids = torch.stack([torch.randperm(E)[:top_k] for _ in range(tokens)] or [torch.empty(0, top_k)]).int()
    ids = ids.reshape(tokens, top_k)
    if tokens > 2:
        ids[1, 0] = ids[2] = -1
    return ids, torch.rand(tokens, top_k)


@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize("rank", [1, 4, 40])
def test_both_products_are_the_sum_over_choices(backend: str, rank: int, top_k: int, tokens: int) -> None:
    experts = LowRankExperts(H, I, E, rank, alpha=[e + 1.0 for e in range(E)])
    nn.init.normal_(experts.lora_B)
    x, (ids, weights) = torch.randn(tokens, H), random_choices(tokens, top_k)
    wanted = torch.zeros(tokens, I, dtype=torch.float64)
    a, b = experts.lora_A.double(), experts.lora_B.double()
    for t in range(tokens):
        for k in range(top_k):
            if (e := int(ids[t, k])) >= 0:
                wanted[t] += float(weights[t, k]) * (e + 1) / rank * (b[e].T @ (a[e] @ x[t].double()))
    size = max(float(wanted.detach().abs().max()), 1e-3) if tokens else 1.0
    for product in (experts._all, experts._chosen, experts):
        y = product(x, ids, weights)
        assert y.shape == (tokens, I)
        # two sums of H and r·K terms, in units of half an ulp of the largest element
        bound = 4 * (H + rank * top_k) * 2.0**-24 * size
        torch.testing.assert_close(y.double(), wanted, rtol=0, atol=bound)


def test_a_token_has_the_same_bits_in_any_batch(isa: str) -> None:
    for rank, top_k in ((4, 8), (40, 1)):
        experts = LowRankExperts(H, I, E, rank)
        nn.init.normal_(experts.lora_B)
        x, (ids, weights) = torch.randn(33, H), random_choices(33, top_k)
        y = experts(x, ids, weights)
        for t in (0, 1, 7, 32):
            assert torch.equal(experts(x[t : t + 1], ids[t : t + 1], weights[t : t + 1])[0], y[t])


def test_an_id_out_of_range_is_an_error() -> None:
    for rank in (1, 40):
        experts = LowRankExperts(H, I, E, rank)
        for wrong in (E, -2):
            with raises(ValueError, "topk_ids"):
                experts(torch.randn(1, H), torch.tensor([[wrong]], dtype=torch.int32), torch.ones(1, 1))


def test_dropout_in_training_only() -> None:
    layer, x = LoRAExperts(nn.Linear(H, I), E, 4, dropout=0.5), torch.randn(4, H)
    nn.init.normal_(layer.low_rank.lora_B)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_k": 2, "normalize": True}, {"slots": 2}])
def test_dtypes_devices_and_autocast(options: dict[str, Any]) -> None:
    """alpha / rank keeps its value in any dtype."""
    layer = LoRAExperts(nn.Linear(H, I), E, 3, alpha=1, **options)
    layer.to(torch.bfloat16)
    assert layer.low_rank.scale.dtype is torch.float32
    assert layer.low_rank.scale.tolist() == torch.full((E,), 1 / 3).tolist()
    y = layer(torch.randn(2, 5, H, dtype=torch.bfloat16))
    assert (y.dtype, y.shape) == (torch.bfloat16, (2, 5, I))
    layer.double()
    assert layer(torch.randn(2, 5, H, dtype=torch.float64)).dtype is torch.float64
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(2, 5, H))
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    wide = LoRAExperts(nn.Linear(H, I, dtype=torch.bfloat16), E, 3, dtype=torch.float32, **options)  # as PEFT does
    assert wide(torch.randn(2, 5, H, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_one_expert_no_tokens_and_leading_dimensions() -> None:
    layer = LoRAExperts(nn.Linear(H, I), 1, 2, top_k=1)
    for shape in ((0, H), (2, 0, H), (H,), (2, 3, 4, H)):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        assert y.shape == (*shape[:-1], I)
        y.sum().backward()
        assert x.grad is not None


# ---- mixtures in a model ---------------------------------------------------------------------------------------------


def test_a_mixture_replaces_all_layers_and_undo_puts_them_back() -> None:
    model, x = Model(), torch.randn(3, 4, H)
    model.blocks[0]["up"].bias.requires_grad_(False)
    before, plain = snapshot(model), model(x)
    mix = mixture(model, [adapter_of(2), adapter_of(5)], top_k=1)
    assert set(mix.layers) == set(SIZES)
    assert model.blocks[1]["down"] is model.blocks[0]["down"]  # still tied
    assert not torch.allclose(model(x), plain)
    trained = {id(p) for p in mix.parameters()}
    assert trained == {id(p) for name, p in model.named_parameters() if p.requires_grad and "norm" not in name}
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in mix.parameters())
    for layer in mix.layers.values():
        assert layer.weight is layer.base.weight
        assert layer.weight.grad is None
    mix.undo()
    assert_untouched(model, before)
    assert torch.equal(model(x), plain)


def test_a_tied_layer_has_one_adapter() -> None:
    model, x, adapter = Model(), torch.randn(3, 4, H), adapter_of(2)
    before, layers = snapshot(model), dict(adapter.layers)
    both = {**layers, "blocks.1.down": low_rank(I, H, 2)}
    with raises(ValueError, "adapters"):
        mixture(model, [Adapter({**layers, "blocks.1.down": layers["blocks.0.down"]}), Adapter(both)])
    assert_untouched(model, before)
    wrong = layers["blocks.0.down"]._replace(alpha=None)
    with raises(TypeError, "adapters"):
        mixture(model, [Adapter({**layers, "blocks.1.down": wrong})])
    twin = copy.deepcopy(model)
    mixture(model, [adapter], top_k=1)
    mixture(twin, [Adapter({**layers, "blocks.1.down": layers["blocks.0.down"]})], top_k=1)
    assert torch.equal(model(x), twin(x))


def test_new_experts_start_as_the_model() -> None:
    model, x = Model(), torch.randn(3, 4, H)
    plain = model(x)
    mix = add_lora_experts(model, E, targets=["up", "blocks.0.down"], **presets.loramoe())
    assert set(mix.layers) == set(SIZES)
    assert torch.equal(model(x), plain)
    assert switchgear.balance_loss(model) == 0.0


def test_state_dict_of_a_mixture() -> None:
    """It has no tensor of the model, and loads into another mixture of the same kind only."""
    model, x, adapters = Model().eval(), torch.randn(3, 4, H), [adapter_of(2), adapter_of(5)]
    twin = copy.deepcopy(model)
    mix, other = mixture(model, adapters, top_k=2), add_lora_experts(twin, 2, [2, 5], alpha=4, targets=SIZES, top_k=2)
    assert not torch.allclose(model(x), twin(x))
    saved = io.BytesIO()
    torch.save(mix.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    assert {key.rpartition("up.")[2] for key in state if "0.up" in key} == {
        "gate.weight", "experts.lora_A", "experts.lora_B"
    }  # fmt: skip
    other.load_state_dict(state)
    assert torch.equal(model(x), twin(x))
    before = snapshot(twin)
    key = next(iter(state))
    for wrong in {
        "missing key": {name: t for name, t in state.items() if name != key},
        "unknown key": {**state, "more": torch.zeros(1)},
        "of shape": {**state, key: torch.zeros(1)},
    }.values():
        with raises(ValueError, "state_dict"):
            other.load_state_dict(wrong)
        assert_untouched(twin, before)
    with raises(TypeError):
        other.load_state_dict({**state, key: 1})
    whole = copy.deepcopy(model)
    whole.load_state_dict(model.state_dict())
    assert torch.equal(whole(x), model(x))


def test_a_copy_is_a_mixture_of_its_own() -> None:
    model, x = Model(), torch.randn(3, 4, H)
    mix = mixture(model, [adapter_of(2), adapter_of(5)], top_k=1, shared_router=True)
    y = model(x)
    twin = copy.deepcopy(model)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    with torch.no_grad():
        for parameter in Mixture(twin).parameters():
            parameter.zero_()
    assert torch.equal(model(x), y)
    Mixture(twin).undo()
    assert not Mixture(twin).layers
    assert set(mix.layers) == set(SIZES)


def test_a_context_reaches_layers_that_the_model_calls_without_one() -> None:
    from functools import partial

    model, x, task = Model(), torch.randn(3, 4, H), torch.randn(3, 5)
    mix = add_lora_experts(model, E, 4, targets=["up"], score=partial(FromEmbedding, dim=5), top_k=2)
    for parameter in mix.expert_parameters():
        nn.init.normal_(parameter)
    with raises(ValueError, "embedding"):
        model(x)
    with mix.context(embedding=task):
        y = model(x)
        with mix.context(embedding=task[1:2]):
            torch.testing.assert_close(model(x[1:2]), y[1:2])
        with raises(TypeError), mix.context(color=1):
            pass
        assert torch.equal(model(x), y)
        assert "known" in vars(copy.deepcopy(model).blocks[0]["up"])
    assert all(layer.known == {} for layer in mix.layers.values())
    layer = mix.layers["blocks.0.up"]
    torch.testing.assert_close(layer(x, embedding=task)[1:2], layer(x[1:2], embedding=task[1:2]))


def test_a_traced_and_changed_mixture() -> None:
    """Routers of layers are found as those of MoE layers."""
    model, x = Model(), torch.randn(3, 4, H)
    mixture(model, [adapter_of(2), adapter_of(5)], top_k=1)
    with switchgear.RoutingTrace(model) as trace, switchgear.override(model, disable=[0]):
        model(x)
    counts = trace.layers["blocks.0.up.gate"].tokens_per_expert
    assert counts.tolist() == [0, 12]


def test_a_mixture_compiles_into_one_graph() -> None:
    torch.compiler.reset()
    model, x = Model(), torch.randn(3, 4, H)
    mixture(model, [adapter_of(2), adapter_of(40)], top_k=1)
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, model(x))
    y.sum().backward()


# ---- errors ----------------------------------------------------------------------------------------------------------


def changed(adapter: Adapter, name: str, **fields: Any) -> Adapter:
    return Adapter({**adapter.layers, name: adapter.layers[name]._replace(**fields)})


def test_wrong_adapters_leave_the_model_untouched() -> None:
    model, good = Model(), adapter_of(2)
    before = snapshot(model)
    last = list(SIZES)[-1]
    fewer = Adapter({name: good.layers[name] for name in list(SIZES)[:2]})
    nan = torch.full((2, H), float("nan"))
    for match, adapters, options in (
        ("adapters", [], {}),
        ("adapters[0]", [Adapter({})], {}),
        ("adapters[1]", [good, fewer], {}),
        (last, [good, changed(good, last, a=torch.randn(2, H + 1))], {}),
        (last, [good, changed(good, last, b=torch.randn(I, 3))], {}),
        (last, [good, changed(good, last, a=nan)], {}),
        (last, [good, changed(good, last, alpha=float("inf"))], {}),
        ("blocks.7.up", [Adapter({"blocks.7.up": good.layers[last]})], {}),
        ("blocks.0.norm", [Adapter({"blocks.0.norm": good.layers[last]})], {}),
        ("top_k", [good], {"top_k": 2}),
        ("dropout", [good], {"dropout": 1.0}),
        ("slots", [good], {"slots": 0}),
        ("blocks.0.up", [good], {"slots": 1, "top_k": 1}),
        ("adapters[0]", [good, Adapter(good.layers, {})], {}),
        ("blocks.0.up", [Adapter(good.layers, {name: torch.zeros(s[0]) for name, s in SIZES.items()})],
         {"top_k": 1}),
        ("blocks.0.up", [Adapter(good.layers, {n: torch.ones(s[0]) / 0 for n, s in SIZES.items()})], {}),
        ("blocks.0.up", [Adapter(good.layers, dict.fromkeys(SIZES, torch.ones(3)))], {}),
    ):  # fmt: skip
        with raises(ValueError, match):
            mixture(model, adapters, **options)
        assert_untouched(model, before)
    for match, adapters, options in (
        ("adapters", "one", {}),
        ("adapters[0]", [Adapter([])], {}),
        ("adapters[0]", [3], {}),
        ("color", [good], {"color": 1}),
        ("alpha", [changed(good, last, alpha="1")], {}),
        ("floating", [changed(good, last, a=torch.ones(2, H, dtype=torch.int32))], {}),
    ):
        with raises(TypeError, match):
            mixture(model, adapters, **options)
        assert_untouched(model, before)


def test_a_failure_in_the_last_layer_leaves_the_model_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before, made = Model(), None, []
    before = snapshot(model)

    def load(self: LowRankExperts, pairs: Any) -> None:
        made.append(self)
        if len(made) == len(SIZES):
            raise KeyboardInterrupt

    monkeypatch.setattr(LowRankExperts, "load", load)
    with pytest.raises(KeyboardInterrupt):
        mixture(model, [adapter_of(2)])
    assert_untouched(model, before)


def test_a_second_mixture_is_refused() -> None:
    model = Model()
    mixture(model, [adapter_of(2)])
    before = snapshot(model)
    for wrong in (
        lambda: mixture(model, [adapter_of(2)]),
        lambda: add_lora_experts(model, E, 2, targets=["base"]),
        lambda: add_lora_experts(model, E, 2, targets=["up"]),
        lambda: LoRAExperts(model.blocks[0]["up"], E, 2),
    ):
        with raises(ValueError):
            wrong()
        assert_untouched(model, before)


def test_wrong_arguments_are_named() -> None:
    model, linear = Model(), nn.Linear(H, I)
    for match, wrong in [
        ("targets", lambda: add_lora_experts(model, E, 2, targets=["gate"])),
        ("targets", lambda: add_lora_experts(model, E, 2, targets=[])),
        ("rank", lambda: LoRAExperts(linear, E, [1, 2])),
        ("rank", lambda: LoRAExperts(linear, E, 0)),
        ("num_experts", lambda: LoRAExperts(linear, 0, 1)),
        ("alpha", lambda: LoRAExperts(linear, E, 2, alpha=[1.0])),
        ("alpha", lambda: LoRAExperts(linear, E, 2, alpha=float("nan"))),
        ("router", lambda: LoRAExperts(linear, E, 2, router=switchgear.Router(H, 4, 1))),
        ("router", lambda: LoRAExperts(linear, E, 2, router=switchgear.Router(H, E, 1), top_k=1)),
        ("gates", lambda: LoRAExperts.from_adapters(linear, [low_rank(H, I, 2)], gates=[])),
        ("hidden_states", lambda: LoRAExperts(nn.Identity(), E, 2, features=(H, H), router=lambda x: switchgear.Routing(
            torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), x, E))(torch.randn(1, H + 1))),
    ]:  # fmt: skip
        with raises(ValueError, match):
            wrong()
    assert linear.weight.requires_grad
    for match, wrong_type in [
        ("rank", lambda: LoRAExperts(linear, E, 2.5)),
        (
            "router",
            lambda: LoRAExperts(nn.Linear(H, I), E, 2, router=nn.Linear(H, E))(torch.randn(2, H)),
        ),
        ("router", lambda: LoRAExperts(linear, E, 2, router=5)),
        ("gates[0]", lambda: LoRAExperts.from_adapters(linear, [low_rank(H, I, 2)], gates=[5])),
        ("bits", lambda: LoRAExperts(linear, E, 2, bits=4)),
        ("base", lambda: LoRAExperts(5, E, 2)),
        ("model", lambda: add_lora_experts(5, E, 2, targets=["up"])),
        ("model", lambda: mixture("model", [adapter_of(2)])),
        ("targets", lambda: add_lora_experts(model, E, 2, targets=5)),
        ("targets", lambda: add_lora_experts(model, E, 2, targets=[5])),
        ("model", lambda: train_gate(None, adapter_of(2), lambda model: None)),
        ("lr", lambda: train_gate(model, adapter_of(2), lambda model: None, lr="fast")),
        ("loss", lambda: train_gate(model, adapter_of(2), 0.5)),
        (
            "loss",
            lambda: train_gate(model, adapter_of(2), lambda model: None),
        ),
        ("adapters[0]", lambda: LoRAExperts.from_adapters(linear, [torch.ones(2)])),
    ]:
        with raises(TypeError, match):
            wrong_type()
    assert linear.weight.requires_grad


def test_train_gate_leaves_the_model_as_it_was_after_a_failure() -> None:
    model, x = Model(), torch.randn(4, H)
    model.blocks[0]["up"].bias.requires_grad_(False)
    before = snapshot(model)

    def fails(model: nn.Module) -> Tensor:
        raise RuntimeError("no data")

    with raises(RuntimeError):
        train_gate(model, adapter_of(2), fails)
    assert_untouched(model, before)
    with raises(ValueError, "loss"):
        train_gate(model, adapter_of(2), lambda model: model(x))
    assert_untouched(model, before)
    with raises(ValueError, "loss"):
        train_gate(model, adapter_of(2), lambda model: model(x).sum() * float("nan"), steps=1)
    assert_untouched(model, before)
    gates = train_gate(model.to(torch.bfloat16), adapter_of(2), lambda model: model(x.bfloat16()).sum(), steps=2).gates
    assert gates is not None
    assert {gate.dtype for gate in gates.values()} == {torch.float32}
    assert isinstance(
        mixture(model, [Adapter(adapter_of(2).layers, gates)]).layers["blocks.0.up"].gate.score, PosthocGate
    )


# ---- models of Hugging Face ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters_of_peft_in_a_hugging_face_model(kind: str, tmp_path: Path) -> None:
    """Also the Conv1D of GPT-2. The mixture generates, is an ordinary model, and gives each adapter's logits."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": H, "vocab_size": 50}
    config = transformers.AutoConfig.for_model(kind, **sizes, intermediate_size=I, n_positions=32)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    targets = ["q_proj", "down_proj"] if kind == "llama" else ["c_attn"]
    tokens = torch.randint(50, (2, 6))
    wanted = []
    for number, rank in enumerate((2, 5)):
        options = peft.LoraConfig(target_modules=targets, r=rank, lora_alpha=3, fan_in_fan_out=kind == "gpt2")
        wrapped = peft.get_peft_model(copy.deepcopy(model), options)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
        wrapped.save_pretrained(tmp_path / str(number))
        with torch.no_grad():
            wanted.append(wrapped.eval()(tokens).logits)
    mix = mixture(model, [tmp_path / "0", tmp_path / "1"], top_k=1, normalize=True)
    assert len(mix.layers) == 2 * len(targets)
    for number, logits in enumerate(wanted):
        with switchgear.override(model, force=[number]), torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, logits)
    assert model.generate(tokens, max_new_tokens=3, pad_token_id=0).shape == (2, 9)
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in mix.expert_parameters())
