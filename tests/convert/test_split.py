# SPDX-License-Identifier: BSD-3-Clause
"""Splits of dense networks into experts, each against a plain loop in float64."""

from __future__ import annotations

import copy
from collections import UserDict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from errors import raises
from switchgear import convert
from switchgear.convert.plans import derive_seed
from switchgear.layers.shared import SharedExperts
from switchgear.routing import ImportanceLoad, Linear, TopK

H, WIDTH = 24, 64


def masked(mlp: SharedExperts, x: Tensor, mask: Tensor) -> Tensor:
    """The dense network with the neurons of `mask` [I] alone, float64."""
    gate, up, down = (part.weight.detach().double() for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    x = x.double()
    return (F.silu(x @ gate.T) * (x @ up.T) * mask.double()) @ down.T


def mask_of(index: Tensor) -> Tensor:
    return torch.zeros(WIDTH, dtype=torch.bool).index_fill_(0, index, True)


def close(a: Tensor, b: Tensor) -> bool:
    """64 products of float32: their rounding errors add up to less than 64 · 6e-8 of the sum of magnitudes, about 1."""
    return bool((a.double() - b.double()).abs().max() < 1e-5)


CASES = [("random", 0), ("random", 0.25), ("contiguous", 0), ("cluster", 0), ("cluster", 8), ("gradient", 0),
         ("gradient", 8), ("interleave", 0)]  # fmt: skip


@pytest.mark.parametrize(("method", "shared"), CASES)
def test_row54_all_experts_are_the_dense_network(method: str, shared: float) -> None:
    mlp, x = SharedExperts(H, WIDTH), torch.randn(11, H)
    importance = torch.rand(WIDTH) if method == "gradient" else None
    moe = convert.split_dense(mlp, 8, method=method, shared=shared, importance=importance, router_init=1.0)
    assert close(moe(x), masked(mlp, x, torch.ones(WIDTH)))
    assert close(moe(x), mlp(x))
    parts = convert.partition(convert.feed_forward(mlp), 8, method, shared=shared, importance=importance)
    together = torch.cat((*parts.experts, parts.shared))
    assert sorted(together.tolist()) == list(range(WIDTH))  # disjoint and complete
    assert len(set(parts.widths)) == 1  # balanced


@pytest.mark.parametrize("weights", ["equal", "softmax"])
def test_row54_chosen_experts_are_rescaled_by_e_over_k(weights: str) -> None:
    mlp, x = SharedExperts(H, WIDTH), torch.randn(11, H)
    moe = convert.split_dense(mlp, 8, 2, method="random", weights=weights, shared=8, seed=1)
    parts = convert.partition(convert.feed_forward(mlp), 8, "random", shared=8, seed=1)
    logits = x.double() @ moe.gate.weight.detach().double().T
    expected = masked(mlp, x, mask_of(parts.shared))
    for token, row in enumerate(logits):
        best = row.topk(2)
        share = best.values.softmax(0) * 2 if weights == "softmax" else torch.ones(2, dtype=torch.float64)
        for weight, expert in zip(share, best.indices.tolist(), strict=True):
            expected[token] += 8 / 2 * weight * masked(mlp, x[token], mask_of(parts.experts[expert]))
    assert close(moe(x), expected)
    unscaled = convert.split_dense(mlp, 8, 2, weights=weights, shared=8, seed=1, rescale=False)
    routed = expected - masked(mlp, x, mask_of(parts.shared))
    assert close(unscaled(x), expected - 0.75 * routed)


def test_row54_biases_are_counted_once() -> None:
    mlp, x = SharedExperts(H, WIDTH, bias=True), torch.randn(11, H)
    for shared in (0, 8):
        assert close(convert.split_dense(mlp, 8, shared=shared)(x), mlp(x))


@pytest.mark.parametrize("gated", [True, False])
def test_row54_clusters_are_found_from_any_start(gated: bool) -> None:
    """Of the gate's rows, or of the only ones. With these seeds the first centers are hardly ever of all clusters."""
    order = torch.randperm(WIDTH)
    mlp = SharedExperts(H, WIDTH, activation="relu2", gated=gated)
    rows = torch.randn(4, H).repeat_interleave(16, 0) + 0.02 * torch.randn(WIDTH, H)
    (mlp.gate_proj if gated else mlp.up_proj).weight.data[order] = rows
    for seed in range(5):
        parts = convert.partition(convert.feed_forward(mlp), 4, "cluster", seed=seed)
        assert {frozenset(p.tolist()) for p in parts.experts} == {frozenset(p.tolist()) for p in order.chunk(4)}


def test_row54_clusters_are_those_of_directions() -> None:
    """LLaMA-MoE's code gives each row the length 1 first."""
    mlp, lengths = SharedExperts(H, WIDTH), 2.0 ** torch.randint(-3, 4, (WIDTH, 1))
    dense = convert.feed_forward(mlp)
    expected = convert.partition(dense, 4, "cluster")
    dense.gate.mul_(lengths)
    found = convert.partition(dense, 4, "cluster")
    assert all(torch.equal(*pair) for pair in zip(found.experts, expected.experts, strict=True))


def test_row54_load_balance_and_noise_are_options() -> None:
    mlp, x = SharedExperts(H, WIDTH), torch.randn(40, H)
    options = {"score": partial(Linear, noise=True), "select": TopK(2, normalize=True, scale=4.0)}
    moe = convert.split_dense(mlp, 8, 2, balance=[ImportanceLoad(1e-2)], **options)
    moe.train()(x)
    sum(moe.losses.values()).backward()
    assert moe.gate.score.weight.grad.any()
    assert moe.gate.score.noise_weight.grad.any()


def minimoe(order: list[int], num_experts: int) -> list[list[int]]:
    """The neurons of each expert, as the paper's code takes them from a network whose neurons are in this order."""
    size = len(order) // num_experts
    num_shared = int(len(order) / num_experts * 2 / 3)
    return [(order[:num_shared] + order[num_shared:][e::num_experts])[:size] for e in range(num_experts)]


def test_row52_interleaved_experts_contain_the_shared_block() -> None:
    """MiniMoE: 2/3 of each expert are shared, the rest is every E-th of the others; the best one is weighted by its
    softmax."""
    mlp, x = SharedExperts(H, 48), torch.randn(11, H)
    moe = convert.split_dense(mlp, 4, method="interleave", shared=2 / 3, router_init=1.0)
    chosen = minimoe(list(range(48)), 4)
    assert chosen[0] == [*range(8), 8, 12, 16, 20]  # neurons 24 to 47 are in none
    assert moe.experts.intermediate_size == 12
    gate, up, down = (part.weight.detach().double() for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    for token in x:
        scores = (moe.gate.weight.detach().double() @ token.double()).softmax(0)
        expert = int(scores.argmax())
        h = F.silu(gate[chosen[expert]] @ token.double()) * (up[chosen[expert]] @ token.double())
        assert close(moe(token[None])[0], scores[expert] * (down[:, chosen[expert]] @ h))


def test_row52_neurons_are_interleaved_in_order_of_importance() -> None:
    importance = torch.rand(48)
    order = sorted(range(48), key=lambda n: -float(importance[n]))
    dense = convert.feed_forward(SharedExperts(H, 48))
    parts = convert.partition(dense, 4, "interleave", shared=2 / 3, importance=importance)
    assert [sorted(expert) for expert in minimoe(order, 4)] == [index.tolist() for index in parts.experts]
    whole = convert.partition(dense, 3, "interleave", shared=1, importance=importance)  # an expert more, in each
    for e, index in enumerate(whole.experts):
        assert index.tolist() == sorted(order[:12] + order[12:][e::3])


def test_row52_one_expert_is_the_identity() -> None:
    mlp, x = SharedExperts(H, 48), torch.randn(11, H)
    assert close(convert.split_dense(mlp, 1, method="interleave", shared=2 / 3)(x), mlp(x))


def test_row55_important_neurons_are_shared_and_the_rest_is_dealt_out() -> None:
    mlp, x = SharedExperts(H, WIDTH), torch.randn(11, H)
    importance = torch.rand(WIDTH)
    parts = convert.partition(convert.feed_forward(mlp), 7, "gradient", shared=1 / 8, importance=importance)
    assert set(parts.shared.tolist()) == set(importance.topk(8).indices.tolist())
    dealt = [turn if number % 2 == 0 else turn[::-1] for number, turn in enumerate(
        importance.argsort(descending=True)[8:].view(-1, 7).tolist()
    )]  # fmt: skip
    assert [p.tolist() for p in parts.experts] == [sorted(expert) for expert in zip(*dealt, strict=True)]
    moe = convert.split_dense(mlp, 7, method="gradient", shared=1 / 8, importance=importance)
    assert close(moe(x), mlp(x))  # residual and experts of weight 1


def test_row55_each_expert_gets_the_neurons_that_matter_to_it() -> None:
    importance = torch.rand(4, WIDTH) * 0.01
    order = torch.randperm(WIDTH)
    for expert in range(4):
        importance[expert, order[16 * expert : 16 * expert + 16]] += 1
    parts = convert.partition(convert.feed_forward(SharedExperts(H, WIDTH)), 4, "gradient", importance=importance)
    for expert, index in enumerate(parts.experts):
        assert set(index.tolist()) == set(order[16 * expert : 16 * expert + 16].tolist())


def test_row55_neurons_of_most_experts_are_shared() -> None:
    """A loop as in LLaMA-MoE v2's code: neurons that most experts have among their best go to the shared expert, until
    it is full. The scale of an expert's row changes nothing."""
    num_shared, size = 16, 12
    importance = torch.rand(4, WIDTH)
    lists = [sorted(range(WIDTH), key=lambda n: -float(row[n])) for row in importance]
    shared: list[int] = []
    while len(shared) < num_shared:
        votes = [sum(n in best[:size] for best in lists) for n in range(WIDTH)]
        shared += [n for n in range(WIDTH) if votes[n] == max(votes)][: num_shared - len(shared)]
        lists = [[n for n in best if n not in shared] for best in lists]
    dense = convert.feed_forward(SharedExperts(H, WIDTH))
    for scale in (torch.ones(4, 1), torch.tensor([[1.0], [1.0], [1.0], [100.0]])):
        parts = convert.partition(dense, 4, "gradient", shared=0.25, importance=importance * scale)
        assert parts.shared.tolist() == sorted(shared)
        assert sorted(torch.cat((*parts.experts, parts.shared)).tolist()) == list(range(WIDTH))


def test_row55_importance_is_monotone_under_zeroing() -> None:
    """A neuron whose column of the down projection shrinks matters less, in proportion; a zeroed one not at all."""
    torch.manual_seed(0)
    mlp, x, target = SharedExperts(H, WIDTH).double(), torch.randn(50, H).double(), torch.randn(50, H).double()

    def importance(scale: float) -> Tensor:
        with torch.no_grad():
            mlp.down_proj.weight[:, 5] = column * scale
        return convert.neuron_importance(mlp, [x], lambda y: (y * target).mean())

    column = mlp.down_proj.weight[:, 5].detach().clone()
    values = [float(importance(scale)[5]) for scale in (0.0, 0.5, 1.0)]
    assert values[0] == 0
    assert values[0] < values[1] < values[2]
    full = importance(1.0)
    for neuron in (5, 17):  # this loss is linear in the output, so its first-order change is the change
        keep = torch.ones(WIDTH, dtype=torch.float64)
        keep[neuron] = 0
        changes = ((masked(mlp, x, keep) - mlp(x)) * target).detach().sum(1) / target.numel()
        assert float(full[neuron]) == pytest.approx(sum(abs(float(change)) for change in changes) / 50, rel=1e-5)
    assert mlp.up_proj.weight.grad is None


def test_row55_importance_does_not_cancel_over_tokens() -> None:
    """The mean of |h · ∂loss/∂h| over tokens, here two with opposite gradients, in one batch or two."""
    mlp, x, target = SharedExperts(H, WIDTH), torch.randn(1, H), torch.randn(1, H)
    x, target = torch.cat((x, x)), torch.cat((target, -target))
    gate, up, down = (part.weight.detach().double() for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    expected = torch.zeros(WIDTH, dtype=torch.float64)
    for row, goal in zip(x.double(), target.double(), strict=True):
        expected += (F.silu(gate @ row) * (up @ row) * (goal @ down)).abs() / 2
    for split in ([[0, 1]], [[0], [1]]):
        batches = [{"x": x[rows], "target": target[rows]} for rows in split]
        found = convert.neuron_importance(Regression(mlp), batches, lambda loss: loss, mlp=mlp)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    with raises(ValueError, "mlp"):
        convert.neuron_importance(Regression(mlp), batches, lambda loss: loss, mlp=SharedExperts(H, WIDTH))


class Regression(nn.Module):
    """The sum of y · target over tokens."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return (self.mlp(x) * target).sum()


class Blocks(nn.Module):
    """Returns an object with a loss, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([SharedExperts(H, WIDTH) for _ in range(3)])

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        for layer in self.layers:
            x = x + layer(x)
        return SimpleNamespace(loss=(x * labels).mean())


def test_row55_importance_of_all_layers_in_one_pass() -> None:
    model = Blocks().requires_grad_(False)
    batches = [{"x": torch.randn(9, H), "labels": torch.randn(9, H)} for _ in range(2)]
    found = convert.layer_importance(model, batches, layers=[0, -1])
    assert list(found) == [0, 2]
    for layer, scores in found.items():
        one = convert.neuron_importance(model, batches, lambda output: output.loss, mlp=model.layers[layer])
        assert scores.sub(one).abs().max() < 1e-7
    assert not any(parameter.requires_grad for parameter in model.parameters())
    moved = convert.split_dense(model, 8, 2, method="gradient", importance=found, layers=[0, 2], shared=8)
    assert [layer.name for layer in moved.layers] == ["layers.0", "layers.2"]


def test_row54_a_mapping_without_scores_is_none() -> None:
    model = convert.split_dense(Blocks(), 8, importance={}, layers=[0]).model
    assert model.layers[0].experts.num_experts == 8


def test_a_module_that_is_read_keeps_its_modes() -> None:
    mlp = SharedExperts(H, WIDTH)
    assert mlp.up_proj is not None
    mlp.up_proj.eval()
    convert.feed_forward(mlp)
    assert mlp.training
    assert not mlp.up_proj.training


def test_row44_activity_of_neurons() -> None:
    model, x = Blocks(), torch.randn(9, H)
    batch = {"x": x, "labels": torch.zeros(9, H)}
    found = convert.layer_importance(model, [batch, UserDict(batch)], by="activation")[0]  # as a tokenizer's
    gate, up = (part.weight.detach().double() for part in (model.layers[0].gate_proj, model.layers[0].up_proj))
    expected = (F.silu(x.double() @ gate.T) * (x.double() @ up.T)).abs().mean(0)
    assert found.sub(expected).abs().max() < 1e-6
    assert not any(module._forward_pre_hooks for module in model.modules())
    for options in ({"by": "size"}, {"layers": [3]}):
        with raises(ValueError, next(iter(options))):
            convert.layer_importance(model, [batch], **options)  # type: ignore[arg-type]
    with raises(ValueError):
        convert.layer_importance(model, [], by="activation")
    with raises(ValueError):
        convert.layer_importance(nn.Sequential(SharedExperts(H, WIDTH)), [x])


class Dropping(Blocks):
    """Takes a mask that changes nothing; dropout in training."""

    def forward(self, x: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        return super().forward(F.dropout(x, 0.5, self.training), labels)


@pytest.mark.parametrize("by", ["activation", "gradient"])
def test_importance_is_that_of_known_tokens_in_eval(by: str) -> None:
    model, x, mask = Dropping(), torch.randn(2, 5, H), torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    padded = {"x": x, "labels": torch.randn(2, 5, H), "attention_mask": mask}
    tokens = {"x": x[mask.bool()], "labels": padded["labels"][mask.bool()] * 7 / 10}  # a loss is a mean over 10
    found, expected = (convert.layer_importance(model, [batch], by=by) for batch in (padded, tokens))
    assert model.training
    for layer in range(3):
        assert found[layer].sub(expected[layer]).abs().max() < 1e-5


def test_importance_of_a_network_that_no_batch_reaches_is_an_error() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = SharedExperts(H, WIDTH), SharedExperts(H, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Skips()
    with raises(ValueError, "batches"):
        convert.neuron_importance(model, [torch.randn(3, H)], torch.sum, mlp=model.idle)
    with raises(ValueError, "batches"):
        convert.layer_importance(model, [torch.randn(3, H)], by="activation")
    x = torch.randn(1, 3, H)
    batch = {"x": x, "labels": x, "attention_mask": torch.zeros(1, 3)}
    for by in ("activation", "gradient"):  # padding alone
        with raises(ValueError, "batches"):
            convert.layer_importance(Dropping(), [batch], by=by)
    with raises(ValueError, "batches"):
        convert.neuron_importance(model, [], torch.sum, mlp=model.idle)


def test_row56_contiguous_slices_with_equal_weights() -> None:
    mlp, x = SharedExperts(H, WIDTH), torch.randn(11, H)
    moe = convert.split_dense(mlp, 4, 2, method="contiguous")
    parts = convert.partition(convert.feed_forward(mlp), 4, "contiguous")
    assert [p.tolist() for p in parts.experts] == [list(range(16 * e, 16 * e + 16)) for e in range(4)]
    routing = moe.gate(x)
    assert (routing.topk_weights == 4 / 2).all()
    moe(x).square().sum().backward()
    assert float(moe.gate.weight.grad.abs().max()) > 0  # of the softmax
    assert (convert.split_dense(mlp, 4, 4, method="contiguous").gate(x).topk_weights == 1).all()  # K = E: scale 1


def test_row56_a_perfect_router_minimises_the_prior_loss() -> None:
    tokens, experts, top_k = 9, 4, 2
    outputs = torch.randn(tokens, experts, H)
    dense = outputs.sum(1)
    best = torch.zeros(tokens, experts)
    for token in range(tokens):
        errors = [float((outputs[token, e].double() - dense[token].double() / (experts / top_k)).square().mean())
                  for e in range(experts)]  # fmt: skip
        for expert in sorted(range(experts), key=lambda e: errors[e])[:top_k]:
            best[token, expert] = 1
    logits = best.clone().requires_grad_(True)
    loss = convert.prior_approximate(logits, outputs, dense, top_k)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-6
    assert float(logits.grad.abs().max()) < 1e-6
    closed = best.clone().index_fill(1, torch.tensor(0), -torch.inf).requires_grad_(True)
    convert.prior_approximate(closed, outputs, dense, top_k).backward()
    assert closed.grad.isfinite().all()
    for _ in range(20):
        assert convert.prior_approximate(best + torch.randn(tokens, experts), outputs, dense, top_k) > loss
    logits = torch.randn(tokens, experts)
    expected = 0.0
    for router, target in zip(logits.double().softmax(-1), best.double().softmax(-1), strict=True):
        expected += sum(float(p * (p / q).log()) for p, q in zip(router, target, strict=True)) / tokens
    found = convert.prior_approximate(logits, outputs, dense, top_k)
    assert abs(float(found) - expected) < 1e-6


def test_row44_domain_masks() -> None:
    """Read-ME: the union of expert and residual is the domain's mask, and computes the masked dense network."""
    mlp, x = SharedExperts(H, WIDTH), torch.randn(11, H)
    importance = torch.rand(3, WIDTH)
    importance[:, :10] += 1  # what every domain needs
    parts = convert.partition(convert.feed_forward(mlp), 3, "domain_masks", importance=importance, keep=0.5)
    masks = [mask_of(row.topk(WIDTH // 2).indices) for row in importance]
    residual = mask_of(parts.shared)
    assert torch.equal(residual, masks[0] & masks[1] & masks[2])
    for mask, expert in zip(masks, parts.experts, strict=True):
        assert torch.equal(mask_of(expert) | residual, mask)
        assert not (mask_of(expert) & residual).any()
    moe = convert.split_dense(mlp, 3, method="domain_masks", importance=importance)
    for domain, mask in enumerate(masks):
        with moe.gate.intervene(force=[domain]):
            assert close(moe(x), masked(mlp, x, mask))


LAYOUTS = [{"interleaved": True}, {"transposed": True}, {"interleaved": True, "transposed": True}]


@pytest.mark.parametrize("layout", [{}, *LAYOUTS])
def test_row44_experts_of_different_widths_and_an_empty_one(layout: dict[str, bool]) -> None:
    mlp, x = SharedExperts(H, WIDTH), torch.randn(11, H)
    ragged = convert.Partition(
        (torch.arange(5), torch.arange(5, 40), torch.arange(0)), torch.arange(40, WIDTH), is_split=True
    )
    moe = convert.split_dense(mlp, 3, method=ragged, **layout)
    assert close(moe(x), mlp(x))
    assert moe.experts.intermediate_sizes == (16, 48, 16)  # padded to what the kernels like
    assert {name for name in ("interleaved", "transposed") if getattr(moe.experts.slices, name)} == set(layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_experts_of_any_layout(layout: dict[str, bool]) -> None:
    mlp, x = SharedExperts(H, WIDTH, bias=True), torch.randn(11, H)
    assert close(convert.split_dense(mlp, 8, **layout)(x), mlp(x))


def test_bad_input_is_named() -> None:
    mlp = SharedExperts(H, WIDTH)
    cases: list[tuple[str, dict[str, object]]] = [
        ("method", {"method": "kmeans"}), ("num_experts", {"num_experts": 7}), ("top_k", {"top_k": 9}),
        ("importance", {"method": "gradient"}),
        ("importance", {"method": "domain_masks", "importance": torch.rand(2, 64)}),
        ("importance", {"method": "gradient", "importance": torch.rand(63)}), ("weights", {"weights": "hard"}),
        ("shared", {"shared": 3}), ("shared", {"shared": 1.5}),
        ("keep", {"method": "domain_masks", "importance": torch.rand(8, 64), "keep": 0.0}),
        ("importance", {"method": "domain_masks", "importance": torch.rand(8, 64), "keep": 1.0}),
        ("router_init", {"router_init": -1.0}),
        ("method", {"method": convert.Partition((torch.arange(64),), torch.arange(0))}),
    ]  # fmt: skip
    for name, options in cases:
        with raises(ValueError, name):
            convert.split_dense(mlp, **{"num_experts": 8, **options})  # type: ignore[arg-type]
    with raises(ValueError):
        convert.split_dense(nn.Linear(3, 3), 2)


def test_seeds_of_layers_go_on_after_the_largest() -> None:
    last = 2**63 - 1
    model = nn.Sequential(*[nn.Sequential(SharedExperts(H, WIDTH)) for _ in range(2)])
    first = convert.split_dense(copy.deepcopy(model[0]), 4, seed=last).model
    both = convert.split_dense(model, 4, seed=last).model
    assert torch.equal(both[0][0].gate.weight, first[0].gate.weight)
    assert [derive_seed(seed, index) for seed, index in ((3, 2), (last, 0), (last, 1), (-(2**63), 1))] == [
        5, last, -(2**63), 1 - 2**63
    ]  # fmt: skip


def test_values_of_another_kind_are_named() -> None:
    mlp, ids, logits = SharedExperts(H, WIDTH), torch.randn(2, H), torch.randn(3, 4)
    masks = {"method": "domain_masks", "importance": torch.rand(4, WIDTH)}
    for wrong in {
        "importance": lambda: convert.split_dense(mlp, 4, method="gradient", importance=[1.0] * WIDTH),
        "keep": lambda: convert.split_dense(mlp, 4, **masks, keep="half"),
        r"^keep: expected": lambda: convert.split_dense(mlp, 4, **masks, keep=torch.nan),
        "lr": lambda: convert.distill_layers(mlp, 4, [ids], lr="fast"),
        "router_init": lambda: convert.from_dense_experts([mlp, mlp], router_init="x"),
        "seed": lambda: convert.from_dense_experts([mlp, mlp], seed="x"),
        r"^seed: expected": lambda: convert.distill_layers(mlp, 4, [ids], seed=None),
        r"^router: expected": lambda: convert.from_dense_experts([mlp, mlp], router=torch.ones(2, H) / 0),
        "input_ids": lambda: convert.sequence_perplexities([mlp], [[1, 2]]),
        "models.1.*w": lambda: convert.merge_models([{"w": ids}, {"w": 1}]),
        "num_heads": lambda: convert.MixtureOfAttention(32, 2, 0),
        "dense_output": lambda: convert.prior_approximate(logits, torch.randn(3, 4, H), ids[:1], 2),  # of one token
        "expert_outputs": lambda: convert.prior_approximate(logits, torch.randn(3, 5, H), torch.randn(3, H), 2),
    }.values():
        with raises((TypeError, ValueError)):
            wrong()
    assert convert.prior_approximate(logits[:0], torch.randn(0, 4, H), ids[:0], 2) == 0
