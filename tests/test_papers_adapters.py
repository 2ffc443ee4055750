# SPDX-License-Identifier: BSD-3-Clause
"""Papers about mixtures of adapters (rows 64 to 70), against float64 loops of their formulas and by their claims."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import switchgear
from errors import raises
from loops import E, H, assert_agrees, best
from switchgear import presets
from switchgear.adapters import (
    Adapter,
    LoRAExperts,
    LowRank,
    Mixture,
    SharedRouter,
    add_lora_experts,
    mixture,
    read_lora,
    train_gate,
)
from switchgear.routing import LocalizedBalance, PosthocGate, TopK


def adapted(options: dict[str, Any], num_experts: int = E, **changes: Any) -> LoRAExperts:
    """A Linear [H,H] with experts whose B is not zero."""
    layer = presets.build(H, H, num_experts, **{**options, "dropout": 0.0, **changes})
    nn.init.normal_(layer.low_rank.lora_B, std=0.5)
    return layer


def base_of(layer: LoRAExperts, x: Tensor) -> Tensor:
    return x @ layer.base.weight.T + layer.base.bias


def adapter(layer: LoRAExperts, e: int, x: Tensor) -> Tensor:
    """alpha / r · B A x of expert e, for x [H]."""
    experts = layer.low_rank
    rank = experts.ranks[e]
    a, b = experts.lora_A[e, :rank], experts.lora_B[e, :rank].T
    return experts.alphas[e] / rank * (b @ (a @ x))


def mixed(layer: LoRAExperts, x: Tensor, ids: Any, weights: Any) -> Tensor:
    """base(x) + Σ_k w_k · adapter_k(x), token by token."""
    rows = [
        sum((w * adapter(layer, e, row) for e, w in zip(chosen, weight, strict=True)), base_of(layer, row))
        for row, chosen, weight in zip(x, ids, weights, strict=True)
    ]
    return torch.stack(rows)


def routed(layer: LoRAExperts, x: Tensor, logits: Tensor, top_k: int, *, over_chosen: bool = False) -> Tensor:
    ids = [best(row, top_k) for row in logits]
    if over_chosen:
        return mixed(layer, x, ids, [logits[t, choice].softmax(-1) for t, choice in enumerate(ids)])
    return mixed(layer, x, ids, [logits[t].softmax(-1)[choice] for t, choice in enumerate(ids)])


def triples(ranks: Any, size_in: int = H, size_out: int = H) -> list[tuple[Tensor, Tensor, float]]:
    return [(torch.randn(r, size_in), torch.randn(size_out, r), 1.5 * r) for r in ranks]


class Block(nn.Module):
    """A feed-forward network and a projection, as a model with Linear layers of two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, 24), nn.Linear(24, H)
        self.head = nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x + self.down(F.silu(self.up(x))))
        return y


LAYERS = {"up": (H, 24), "down": (24, H)}


def adapter_of(rank: int, alpha: float = 3.0) -> Adapter:
    return Adapter({name: LowRank(*triples([rank], *sizes)[0][:2], alpha) for name, sizes in LAYERS.items()})


# ---- LoRAMoE ---------------------------------------------------------------------------------------------------------


def test_row64_loramoe_starts_as_its_base_and_is_a_loop(backend: str) -> None:
    types = [e % 2 for e in range(E)]
    layer = presets.build(H, H, E, **presets.loramoe(expert_types=types, dropout=0.0))
    x, of_sequences = torch.randn(3, 5, H), torch.tensor([0, 1, 1])
    torch.testing.assert_close(layer(x, embedding=of_sequences), layer.base(x), rtol=0, atol=0)
    nn.init.normal_(layer.low_rank.lora_B, std=0.5)

    def loop(layer: LoRAExperts, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, H)
        p = (rows @ layer.gate.weight.T).softmax(-1)
        y = mixed(layer, rows, [range(E)] * len(rows), p).view(x.shape)
        z = []  # Z = I · Q: the weight of each expert in each sequence, larger where the types agree
        for s in range(3):
            for e in range(E):
                importance = 1.1 if types[e] == of_sequences[s] else 0.9
                z.append(importance * sum(p[5 * s + t, e] for t in range(5)))
        mean = sum(z) / len(z)
        return y, 0.1 * (sum((one - mean) ** 2 for one in z) / len(z)) / mean

    assert_agrees(layer, loop, x, embedding=of_sequences)
    assert layer.base.weight.grad is None
    assert not layer.base.weight.requires_grad
    assert (layer.low_rank.ranks[0], layer.low_rank.alphas[0]) == (4, 32)


def test_row64_loramoe_loss_is_zero_if_balanced() -> None:
    """Z is equal for all experts and sequences: the weights make up for the types."""
    loss = LocalizedBalance([0, 1], delta=0.25, coefficient=1.0)
    weights = torch.tensor([[0.75, 1.25], [1.25, 0.75]])
    routing = switchgear.Routing(torch.tensor([[0, 1], [0, 1]], dtype=torch.int32), weights, weights, 2)
    known = switchgear.Context(embedding=torch.tensor([0, 1]), sequence_length=1)
    assert float(loss(routing, known)) < 1e-7
    assert float(loss(routing._replace(topk_weights=torch.ones(2, 2)), known)) > 0.01


def test_row64_loramoe_can_not_be_merged() -> None:
    layer = adapted(presets.loramoe())
    with raises(ValueError, "model"):
        layer.merge()


# ---- Octavius --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [None, 5])
def test_row65_octavius_routes_whole_samples(backend: str, dim: int | None) -> None:
    layer, x = adapted(presets.octavius(dim=dim, rank=6, dropout=0.0)), torch.randn(3, 4, H)
    context = {} if dim is None else {"embedding": torch.randn(3, dim)}

    def loop(layer: LoRAExperts, x: Tensor) -> Tensor:
        score, outputs = layer.gate.score, []
        for s, sample in enumerate(x):
            if dim is None:
                logits = score.score.weight @ (sum(sample) / len(sample))
            else:
                logits = score.linear.weight @ context["embedding"][s].to(x.dtype)
            outputs.append(routed(layer, sample, logits.expand(len(sample), -1), 2, over_chosen=True))
        return torch.stack(outputs)

    assert_agrees(layer, loop, x, **context)
    ids = layer.gate(x, switchgear.Context(**context)).topk_ids.view(3, 4, 2)
    assert (ids == ids[:, :1]).all()
    assert presets.build(H, H, E, **presets.octavius()).low_rank.dropout == 0.1


def test_row65_octavius_does_not_see_the_rest_of_the_batch(isa: str) -> None:
    layer, x = adapted(presets.octavius(rank=6)).eval(), torch.randn(3, 4, H)
    together = layer(x) - layer.base(x)
    for s in range(3):
        torch.testing.assert_close(layer(x[s : s + 1]) - layer.base(x[s : s + 1]), together[s : s + 1])
    routing = [layer.gate(x), layer.gate(x[1:2])]
    rows = [layer.experts(x.view(-1, H), *routing[0][:2])[4:8], layer.experts(x[1], *routing[1][:2])]
    assert torch.equal(*rows)  # products of the kernels: the same bits


# ---- Intuition-MoR1E -------------------------------------------------------------------------------------------------


def test_row66_mor1e_is_a_loop_of_rank_one_experts(backend: str) -> None:
    centroids, task = torch.randn(E, 5), torch.randn(3, 5)
    layer, x = adapted(presets.mor1e(centroids, weight=2.0, tau=0.5)), torch.randn(3, 4, H)

    def loop(layer: LoRAExperts, x: Tensor) -> Tensor:
        plain, _ = layer.gate.score.scores
        outputs = []
        for s, sample in enumerate(x):
            e = task[s].to(x.dtype)
            near = torch.stack([e @ c / (e.norm() * c.norm()) for c in centroids.to(x.dtype)]) * 2 / 0.5
            outputs.append(routed(layer, sample, sample @ plain.weight.T + near, 2))
        return torch.stack(outputs)

    assert_agrees(layer, loop, x, embedding=task)


def test_row66_mor1e_with_open_gates_is_a_lora(backend: str) -> None:
    layer, x = adapted(presets.mor1e(torch.randn(E, 5))), torch.randn(7, H)
    ids = torch.arange(E, dtype=torch.int32).expand(7, -1)
    a, b = layer.low_rank.lora_A[:, 0], layer.low_rank.lora_B[:, 0]  # a LoRA of rank E: A [E,H] and Bᵀ [E,H]
    torch.testing.assert_close(layer.low_rank(x, ids, torch.ones(7, E)), x @ a.T @ b)


def test_row66_mor1e_without_weight_of_the_prior_is_a_plain_router(backend: str) -> None:
    layer, x = adapted(presets.mor1e(torch.randn(E, 5), weight=0.0)), torch.randn(2, 4, H)
    plain = switchgear.Router(H, E, 2)
    with torch.no_grad():
        plain.weight.copy_(layer.gate.score.scores[0].weight)
    routing = layer.gate(x, switchgear.Context(embedding=torch.randn(2, 5)))
    assert torch.equal(routing.topk_ids, plain(x).topk_ids)
    torch.testing.assert_close(routing.topk_weights, plain(x).topk_weights)


# ---- Omni-SMoLA ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, 12])
def test_row67_smola_is_a_soft_mixture_beside_a_frozen_module(backend: str, rank: int) -> None:
    layer, x = presets.build(H, H, E, **presets.smola(rank=rank, slots=2)), torch.randn(3, 5, H)
    torch.testing.assert_close(layer(x), layer.base(x), rtol=0, atol=0)
    nn.init.normal_(layer.low_rank.lora_B, std=0.5)

    def loop(layer: LoRAExperts, x: Tensor) -> Tensor:
        soft, outputs = layer.experts, []
        for sample in x:
            phi = torch.stack([soft.scale * row / row.norm() for row in soft.phi])
            logits = torch.stack([phi @ (row / row.norm()) for row in sample])  # [T, E·slots]
            dispatch, combine = logits.softmax(0), logits.softmax(1)
            torch.testing.assert_close(dispatch.sum(0), torch.ones_like(dispatch[0]))
            torch.testing.assert_close(combine.sum(1), torch.ones_like(combine[:, 0]))
            slots = [adapter(layer, j // 2, sum(dispatch[t, j] * sample[t] for t in range(5))) for j in range(2 * E)]
            rows = [sum(c * y for c, y in zip(row, slots, strict=True)) for row in combine]
            outputs.append(base_of(layer, sample) + torch.stack(rows))
        return torch.stack(outputs)

    assert_agrees(layer, loop, x)


def test_row67_smola_adapts_a_module_of_two_widths() -> None:
    """The base may be any module: a Linear with more outputs, or a feed-forward network."""
    layer = LoRAExperts(nn.Linear(H, 24), E, 4, slots=1)
    assert layer(torch.randn(3, 5, H)).shape == (3, 5, 24)
    layer = LoRAExperts(switchgear.layers.SharedExperts(H, 24), E, 4, slots=1, features=(H, H))
    x = torch.randn(3, 5, H)
    assert torch.equal(layer(x), layer.base(x))
    with raises(ValueError, "features"):
        LoRAExperts(switchgear.layers.SharedExperts(H, 24), E, 4)


# ---- PHATGOOSE -------------------------------------------------------------------------------------------------------


def standardised(v: Tensor) -> Tensor:
    return (v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt()


@pytest.mark.parametrize("by_preset", [False, True])
def test_row68_phatgoose_is_a_loop_over_standardised_gates(backend: str, by_preset: bool) -> None:
    gates = [torch.randn(H) * (e + 1) for e in range(E)]
    names = ("score", "select") if by_preset else ()  # without them, gates imply the same
    options = {name: presets.phatgoose()[name] for name in names}
    layer = LoRAExperts.from_adapters(nn.Linear(H, H), triples([16] * E), gates=gates, **options)

    def loop(layer: LoRAExperts, x: Tensor) -> Tensor:
        vectors = [standardised(v) for v in layer.gate.score.gates]
        logits = torch.stack([torch.stack([v @ standardised(row) / math.sqrt(H) for v in vectors]) for row in x])
        return routed(layer, x, logits, 2, over_chosen=True)

    assert_agrees(layer, loop, torch.randn(9, H), length=1024)


def test_row68_phatgoose_of_one_adapter_is_a_lora(backend: str) -> None:
    (a, b, alpha), base, x = triples([3])[0], nn.Linear(H, H), torch.randn(9, H)
    wanted = base(x) + alpha / 3 * (x @ a.T @ b.T)
    layer = LoRAExperts.from_adapters(base, [(a, b, alpha)], gates=[torch.randn(H)])
    torch.testing.assert_close(layer(x), wanted)


def test_row68_phatgoose_takes_a_further_adapter_without_training() -> None:
    adapters, gates, x = triples([4] * 5), list(torch.randn(5, H)), torch.randn(9, H)
    four = LoRAExperts.from_adapters(nn.Linear(H, H), adapters[:4], gates=gates[:4])
    five = LoRAExperts.from_adapters(nn.Linear(H, H), adapters, gates=gates)
    torch.testing.assert_close(five.gate(x).router_logits[:, :4], four.gate(x).router_logits)
    assert torch.equal(five.gate.score.gates[:4], four.gate.score.gates)


def test_row68_phatgoose_trains_the_gates_only() -> None:
    """And they point to what the adapter is for: here, to tokens with a positive first feature."""
    model = Block()
    of_task = Adapter({"up": LowRank(*triples([2], H, 24)[0][:2], 4.0)})
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    x = torch.randn(256, H)
    with torch.no_grad():
        mixed = mixture(model, [of_task])
        adapted, plain = model(x), mixed.layers["up"].base
        mixed.undo()
        target = torch.where(x[:, :1] > 0, adapted, model(x))
    assert model.up is plain
    losses = []

    def loss(model: nn.Module) -> Tensor:
        losses.append((model(x) - target).square().mean())
        return losses[-1]

    trained = train_gate(model, of_task, loss, steps=60, lr=0.1)
    assert losses[-1] < losses[0] / 2
    assert trained.gates["up"][0] == trained.gates["up"].abs().max()
    assert of_task.gates is None
    assert torch.equal(trained.layers["up"].a, of_task.layers["up"].a)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert isinstance(mixture(model, [trained, trained]).layers["up"].gate.score, PosthocGate)


# ---- Self-MoE --------------------------------------------------------------------------------------------------------


def test_row69_self_moe_shares_its_router() -> None:
    model, x = Block(), torch.randn(5, H)
    plain = Block()
    plain.load_state_dict(model.state_dict())
    adapters = [adapter_of(rank) for rank in (2, 3, 4)]
    mix = mixture(model, adapters, shared_router=True, **presets.self_moe(top_k=3))
    assert {id(layer.router) for layer in mix.layers.values()} == {id(model.up.gate)}
    names = [name for name, _ in model.named_parameters() if "router" in name or "gate" in name]
    assert names == ["up.gate.routers.16.weight", "up.gate.routers.24.weight"]
    assert len(mix.router_parameters()) == 2
    assert [key for key in model.state_dict() if "gate" in key] == names

    def lora(name: str, x: Tensor) -> Tensor:  # K = n: h = theta_0 x + Σ_i alpha_i dTheta_i x
        linear, router = getattr(plain, name), model.up.gate.routers[str(x.shape[1])]
        alphas = (x @ router.weight.T).softmax(-1)
        total = linear(x)
        for i, one in enumerate(adapters):
            a, b, alpha = one.layers[name]
            total = total + alphas[:, i : i + 1] * (alpha / len(a)) * (x @ a.T @ b.T)
        return total

    wanted = plain.head(x + lora("down", F.silu(lora("up", x))))
    torch.testing.assert_close(model(x), wanted)
    twin = copy.deepcopy(model)
    assert Mixture(twin).layers["down"].router is twin.up.gate
    torch.testing.assert_close(twin(x), wanted)
    mix.undo()
    assert torch.equal(model(x), plain(x))


def test_row69_self_moe_counts_the_router_of_one_width_once() -> None:
    model = nn.Sequential(*(nn.Linear(H, H) for _ in range(3)))
    mix = add_lora_experts(model, E, targets=["0", "1", "2"], shared_router=True, **presets.self_moe())
    assert sum(p.numel() for p in mix.router_parameters()) == E * H
    model(torch.randn(4, H)).sum().backward()
    assert mix.router_parameters()[0].grad is not None
    assert isinstance(model[0].gate, SharedRouter)
    assert model[1].gate is None


# ---- Open Knowledge --------------------------------------------------------------------------------------------------


class OneHot(nn.Module):
    """A router that sends every token to one expert."""

    def __init__(self, expert: int, num_experts: int) -> None:
        super().__init__()
        self.expert, self.num_experts = expert, num_experts

    def forward(self, x: Tensor, context: Any = None) -> switchgear.Routing:
        rows = x.reshape(-1, x.shape[-1])
        ids = torch.full((len(rows), 1), self.expert, dtype=torch.int32)
        return switchgear.Routing(ids, torch.ones(len(rows), 1), rows, self.num_experts)


def test_row70_adapters_of_peft_with_different_ranks_load(tmp_path: Path, backend: str) -> None:
    """Under a one-hot router the mixture's output is PEFT's, for every adapter, from files and from state dicts."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, x = Block(), torch.randn(6, H)
    options = [
        {"r": 4, "lora_alpha": 8},
        {"r": 7, "lora_alpha": 3, "use_rslora": True},
        {"r": 2, "lora_alpha": 5, "rank_pattern": {"down": 9}, "alpha_pattern": {"^down": 4}},
    ]
    wanted, sources = [], []
    for number, option in enumerate(options):
        config = peft.LoraConfig(target_modules=["up", "down"], **option)
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
        wrapped.save_pretrained(tmp_path / str(number))
        with torch.no_grad():
            wanted.append(wrapped(x))
        given = (peft.get_peft_model_state_dict(wrapped), config)
        sources.append(given if number == 2 else tmp_path / str(number))
    for number, y in enumerate(wanted):
        mix = mixture(model, sources, router=OneHot(number, 3))
        assert {layer.low_rank.ranks for layer in mix.layers.values()} == {(4, 7, 2), (4, 7, 9)}
        torch.testing.assert_close(model(x), y)
        mix.undo()
    assert not torch.allclose(wanted[0], wanted[1])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_row70_ragged_ranks_are_a_loop(backend: str, top_k: int) -> None:
    """Also gradients: what fills up the lower ranks stays zero."""
    layer = LoRAExperts.from_adapters(nn.Linear(H, H), triples([1, 5, 40, 8, 3]), top_k=top_k)
    assert layer.low_rank.lora_A.shape == (5, 40, H)

    def loop(layer: LoRAExperts, x: Tensor) -> Tensor:
        return routed(layer, x, x @ layer.gate.weight.T, top_k)

    assert_agrees(layer, loop, torch.randn(11, H), length=1024)
    layer(torch.randn(11, H)).square().sum().backward()
    for parameter in (layer.low_rank.lora_A, layer.low_rank.lora_B):
        for e, rank in enumerate(layer.low_rank.ranks):
            assert not parameter.grad[e, rank:].any()
            assert not parameter[e, rank:].any()


def test_row70_reads_what_peft_writes_and_nothing_else(tmp_path: Path) -> None:
    a, b = torch.randn(2, H), torch.randn(24, 2)
    state, config = {"base_model.model.up.lora_A.weight": a, "base_model.model.up.lora_B.weight": b}, {"lora_alpha": 4}
    assert read_lora((state, config)).layers["up"].alpha == 4
    nested = {f"block.{key.removeprefix('base_model.model.')}": value for key, value in state.items()}
    for pattern, alpha in {"up": 9, "block.up": 9, "^up": 4, "p": 4}.items():  # PEFT's: the end of a name, after a dot
        patterns = {**config, "alpha_pattern": {pattern: 9}}
        assert read_lora((nested, patterns)).layers["block.up"].alpha == alpha
    broken = tmp_path / "broken"
    broken.mkdir()
    for match, source in [
        ("adapter_config.json", tmp_path),
        ("adapter", state),
        ("lora_alpha", (state, {"r": 2})),
        ("config", (state, 3)),
        ("r", (state, {**config, "r": "2"})),
        ("rank_pattern", (state, {**config, "rank_pattern": {"(": 2}})),
        ("use_dora", (state, {**config, "use_dora": True})),
        ("init_lora_weights", (state, {**config, "init_lora_weights": "pissa"})),
        ("target_parameters", (state, {**config, "target_parameters": ["experts.down_proj"]})),
        ("rank", (state, {**config, "r": 3})),
        ("adapter", ({}, config)),
        ("adapter", ({**state, "up.lora_A.other.weight": a}, config)),
        ("adapter", ({"up.lora_A.weight": a.int()}, config)),
        ("adapter", ({"up.lora_A.weight": a}, config)),
        ("adapter", ({**state, "up.lora_magnitude_vector": a}, config)),
        ("up", ({**state, "base_model.model.up.lora_B.weight": torch.randn(24, 3)}, config)),
        ("up", ({**state, "base_model.model.up.lora_A.weight": a / 0}, config)),
    ]:
        with raises(ValueError, match):
            read_lora(source)
    (broken / "adapter_config.json").write_text("{")
    with raises(ValueError):
        read_lora(broken)
    (broken / "adapter_config.json").write_text(json.dumps(config))
    with raises(ValueError):
        read_lora(broken)
    (broken / "adapter_model.safetensors").write_bytes(b"nonsense")
    with raises(ValueError):
        read_lora(broken)
    (broken / "adapter_model.safetensors").unlink()
    (broken / "adapter_model.bin").write_bytes(b"nonsense")
    with raises(ValueError):
        read_lora(broken)
    torch.save(state, broken / "adapter_model.bin")
    assert torch.equal(read_lora(broken).layers["up"].a, a)
    with raises(TypeError):
        read_lora(3)


def test_row70_topk_of_more_than_the_adapters() -> None:
    with raises(ValueError, "top_k"):
        LoRAExperts.from_adapters(nn.Linear(H, H), triples([2, 2]), top_k=3)
    assert TopK(2).top_k == 2
