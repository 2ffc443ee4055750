# SPDX-License-Identifier: BSD-3-Clause
"""Papers about the router's logits, against float64 loops of their formulas and by their claims."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import switchgear
from errors import raises
from loops import E, H, I, assert_agrees, assert_same, best, expert, layer_of, mixture, switch_loss
from switchgear import presets
from switchgear.layers import sigma_moe_values
from switchgear.routing import (
    ActivationNorm,
    ClusterPrior,
    Context,
    Cosine,
    Domain,
    FromEmbedding,
    Gaussian,
    GroupedAvgPool,
    Linear,
    PerSequence,
    PosthocGate,
    SparsityAware,
    Sum,
    Temperature,
    TopK,
    min_capacity,
)
from switchgear.routing.context import NOTHING_KNOWN


def top_k_loop(layer: Any, x: Tensor, logits: Tensor, top_k: int, scores: Tensor | None = None) -> Tensor:
    """The mixture of the experts with the top_k largest logits, weighted by scores (default: their softmax)."""
    scores = logits.softmax(-1) if scores is None else scores
    ids = [best(row, top_k) for row in logits]
    weights = [scores[t, choice] for t, choice in enumerate(ids)]
    return mixture(layer.experts, x, ids, weights)


# ---- X-MoE -----------------------------------------------------------------------------------------------------------


def xmoe_logits(score: Cosine, x: Tensor) -> Tensor:
    rows = []
    for row in x:
        low = score.projection @ row
        cosines = [low @ e / (low.norm() * e.norm()) for e in score.embeddings]
        rows.append(torch.stack(cosines) / score.log_tau.exp())
    return torch.stack(rows)


def test_row10_xmoe_is_a_loop_of_cosines(backend: str) -> None:
    layer = layer_of(presets.xmoe(top_k=2, balance=0.1))

    def loop(layer: Any, x: Tensor) -> Any:
        logits = xmoe_logits(layer.gate.score, x)
        ids = [best(row, 2) for row in logits]
        return top_k_loop(layer, x, logits, 2), 0.1 * switch_loss(logits.softmax(-1), ids)

    assert_agrees(layer, loop, torch.randn(20, H))


def test_row10_xmoe_does_not_see_lengths() -> None:
    score, x = Cosine(H, E, dim=4).double(), torch.randn(9, H).double()
    logits = score(x, NOTHING_KNOWN)
    torch.testing.assert_close(score(x * torch.rand(9, 1).double() * 50, NOTHING_KNOWN), logits)
    with torch.no_grad():
        score.embeddings.mul_(torch.rand(E, 1) + 0.1)
    torch.testing.assert_close(score(x, NOTHING_KNOWN), logits)
    code = Cosine(H, E, dim=4, normalize_input=False).double()
    code.load_state_dict(score.state_dict())
    torch.testing.assert_close(code(2 * x, NOTHING_KNOWN), 2 * code(x, NOTHING_KNOWN))


def test_row10_xmoe_learns_its_temperature_above_a_floor() -> None:
    score, x = Cosine(H, E, tau=0.5, min_tau=0.1).double(), torch.randn(3, H).double()
    log_tau = score.log_tau.detach().clone().requires_grad_()

    def logits(log_tau: Tensor, embeddings: Tensor) -> Tensor:
        return torch.func.functional_call(score, {"log_tau": log_tau, "embeddings": embeddings}, (x, NOTHING_KNOWN))

    assert torch.autograd.gradcheck(logits, (log_tau, score.embeddings.detach().requires_grad_()))
    with torch.no_grad():
        score.log_tau.fill_(-9)
    torch.testing.assert_close(score(x, NOTHING_KNOWN), 0.5 / 0.1 * logits(torch.tensor(0.5).log(), score.embeddings))
    assert Cosine(H, E).dim == E // 2


def test_row10_xmoe_loads_scalars() -> None:
    """log_tau had no dimension once."""
    layer = layer_of(presets.xmoe(top_k=2, balance_tau=0.07))
    state = {
        name: torch.tensor(0.25) if name.endswith("log_tau") else tensor for name, tensor in layer.state_dict().items()
    }
    layer.load_state_dict(state)
    assert layer.gate.score.log_tau.tolist() == layer.gate.select.log_tau.tolist() == [0.25]


def test_row10_xmoe_balances_by_a_fixed_temperature(backend: str) -> None:
    """The choice and its weight use the learned temperature, the loss 0.07."""
    layer = layer_of(presets.xmoe(top_k=2, balance=0.1, balance_tau=0.07))
    with torch.no_grad():
        layer.gate.select.log_tau.fill_(math.log(0.5))

    def loop(layer: Any, x: Tensor) -> Any:
        cosines = xmoe_logits(layer.gate.score, x)  # log_tau = 0
        logits = cosines / layer.gate.select.log_tau.exp()
        y = top_k_loop(layer, x, logits, 2)
        return y, 0.1 * switch_loss((cosines / 0.07).softmax(-1), [best(row, 2) for row in logits])

    assert_agrees(layer, loop, torch.randn(20, H))
    with raises(ValueError):
        Temperature(TopK(1), fixed=0.0)


# ---- sigma-MoE -------------------------------------------------------------------------------------------------------


def test_row11_sigma_moe_is_a_loop_of_sigmoids(backend: str) -> None:
    layer = layer_of(presets.sigma_moe(expert_dropout=0.0, entropy=0.1))

    def loop(layer: Any, x: Tensor) -> Any:
        logits = x @ layer.gate.score.weight.T
        mean = logits.softmax(-1).mean(0)
        return top_k_loop(layer, x, logits, 4, logits.sigmoid()), 0.1 * sum(p * p.log() for p in mean)

    assert_agrees(layer, loop, torch.randn(20, H))


def test_row11_the_entropy_loss_of_sigma_moe_sees_hidden_experts() -> None:
    """It is of softmax(W·x): dropout hides experts from the choice alone."""
    layer, x = layer_of(presets.sigma_moe(expert_dropout=0.5, top_k=2, entropy=1.0)), torch.randn(64, H)
    weight = layer.gate.score.weight
    layer(x)
    (grad,) = torch.autograd.grad(layer.losses["batch_entropy"], weight, retain_graph=True)
    twin = weight.detach().double().requires_grad_()
    mean = (x.double() @ twin.T).softmax(-1).mean(0)
    wanted = sum(p * p.log() for p in mean)
    assert_same(layer.losses["batch_entropy"].detach(), wanted.detach(), 256, "loss")
    assert_same(grad, *torch.autograd.grad(wanted, twin), 256, "gradient")


def test_row11_sigma_moe_gives_each_row_of_the_router_their_root_mean_square_norm() -> None:
    """The sum of all squares stays that of the normal draw, which is the last one."""
    layer, drawn = layer_of(presets.sigma_moe()), []
    normal = nn.init.normal_

    def remembered(weight: Tensor, **options: Any) -> Tensor:
        drawn.append(normal(weight, **options).double().clone())
        return weight

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.init, "normal_", remembered)
        sigma_moe_values(layer)
    mean = math.sqrt(sum(float(value) ** 2 for row in drawn[-1] for value in row) / E)
    for row, before in zip(layer.gate.score.weight.detach().double(), drawn[-1], strict=True):
        torch.testing.assert_close(row, before / before.norm() * mean, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("num_layers", "factor"), [(None, 1.0), (18, 1 / 3)])
def test_row11_sigma_moe_is_plain_relu_with_the_paper_s_initial_values(num_layers: int | None, factor: float) -> None:
    """Standard deviations 1/√H for keys and router, 1/√(E·G) for values, times √(2 / layers); of n samples known to
    1/√(2n), times 5."""
    layer = presets.build(64, 32, 16, **presets.sigma_moe(num_layers=num_layers))
    assert not layer.experts.gated
    assert layer.experts.activation == "relu"
    for weight, std in ((layer.experts.up_proj, 64**-0.5), (layer.experts.down_proj, (16 * 32) ** -0.5)):
        assert float(weight.detach().std()) == pytest.approx(factor * std, rel=5 / math.sqrt(2 * weight.numel()))
    router = layer.gate.score.weight.detach()
    assert float(router.norm(dim=1).mean()) == pytest.approx(factor, rel=5 / math.sqrt(2 * router.numel()))
    torch.testing.assert_close(router.norm(dim=1), router.norm(dim=1)[:1].expand(16))
    with raises(ValueError, "num_layers"):
        presets.sigma_moe(num_layers=0)


def test_row11_sigma_moe_never_chooses_a_hidden_expert() -> None:
    layer = layer_of(presets.sigma_moe(expert_dropout=0.5), return_routing=True)
    x = torch.randn(500, H)
    _, routing = layer(x)
    hidden = routing.router_logits == torch.finfo(torch.float32).min
    assert 0.45 < hidden.float().mean() < 0.55
    chosen = routing.topk_ids >= 0
    assert not hidden.gather(1, routing.topk_ids.clamp(min=0).long())[chosen].any()
    assert torch.equal(chosen.sum(1), (~hidden).sum(1).clamp(max=4))
    assert (layer.eval()(x)[1].topk_ids >= 0).all()


def test_row11_sigma_moe_of_width_one_is_a_sparse_feed_forward_layer() -> None:
    """E = d_ff experts of one unit each, chosen by their own pre-activation: the top-k activation of a dense layer."""
    layer = switchgear.MoE(H, 1, 32, select=TopK(5, "sigmoid"), activation="relu", gated=False)
    with torch.no_grad():
        layer.gate.weight.copy_(layer.experts.up_proj[:, 0])
    x = torch.randn(7, H)
    z = x @ layer.experts.up_proj[:, 0].T
    a = (z.relu() * z.sigmoid()) * torch.zeros_like(z).scatter(1, z.topk(5).indices, 1.0)
    torch.testing.assert_close(layer(x), a @ layer.experts.down_proj[:, :, 0])


# ---- Skywork-MoE -----------------------------------------------------------------------------------------------------


def test_row13_skywork_is_a_loop_of_normalised_logits(backend: str) -> None:
    """z = W x + b, g = softmax(lam · (z - mean) / deviation), y = Σ_chosen g_e · expert_e(x) / Σ_chosen g_e."""
    layer = layer_of(presets.skywork(lam=1.5, capacity_factor=8.0))

    def loop(layer: Any, x: Tensor) -> Any:
        score, rows, ids, probabilities = layer.gate.score, [], [], []
        for row in x:
            z = score.weight @ row + score.bias
            deviation = (sum((z - z.mean()) ** 2) / E + 1e-12).sqrt()  # keeps equal logits finite
            g = (1.5 * (z - z.mean()) / deviation).exp()
            g = g / sum(g)
            chosen = best(g, 2)
            rows.append(sum(g[e] * expert(layer.experts, e, row) for e in chosen) / sum(g[e] for e in chosen))
            ids.append(chosen)
            probabilities.append(g)
        coefficient = layer.gate.balance[0].coefficient.value
        return torch.stack(rows), coefficient * switch_loss(torch.stack(probabilities), ids)

    assert_agrees(layer, loop, torch.randn(20, H))


def test_row13_skywork_spreads_logits_by_lambda() -> None:
    x, ratios = torch.randn(50, H), []
    for lam in (0.5, 1.0, 2.0):
        score = Linear(H, E, normalize="zscore", lam=lam)
        torch.manual_seed(1)
        score.reset_parameters()
        logits = score(x, NOTHING_KNOWN)
        torch.testing.assert_close(logits.mean(-1), torch.zeros(50), atol=1e-6, rtol=0)
        torch.testing.assert_close(logits.std(-1, correction=0), torch.full((50,), lam), rtol=1e-4, atol=0)
        top = logits.softmax(-1).topk(2).values
        ratios.append((top[:, 0] / top[:, 1]).mean().item())
        assert score(torch.zeros(3, H), NOTHING_KNOWN).eq(0).all()  # no variance
        score.zero_grad()
        score(torch.zeros(3, H), NOTHING_KNOWN).sum().backward()
        assert score.weight.grad.isfinite().all()
    assert ratios == sorted(ratios)


def test_row13_skywork_coefficient_is_an_average_of_drop_rates() -> None:
    layer = layer_of(presets.skywork(xi=0.2, alpha_max=0.01, beta=0.9), return_routing=True)
    coefficient, alpha = layer.gate.balance[0].coefficient, 0.01
    for _ in range(5):
        _, routing = layer(torch.randn(40, H))
        alpha = 0.9 * alpha + 0.1 * min(0.2 * routing.num_dropped.item() / 80, 0.01)
        switchgear.after_step(layer)
        assert coefficient.value.item() == pytest.approx(alpha, rel=1e-5)
    assert routing.num_dropped > 0
    again = layer_of(presets.skywork())
    again.load_state_dict(layer.state_dict())
    assert again.gate.balance[0].coefficient.value == coefficient.value


# ---- LocMoE ----------------------------------------------------------------------------------------------------------


def test_row14_locmoe_is_a_loop_of_slice_means(backend: str) -> None:
    layer = layer_of(presets.locmoe(num_nodes=2, node=1, locality=0.1, balance=0.1))

    def loop(layer: Any, x: Tensor) -> Any:
        size = H // E
        logits = torch.stack([x[:, e * size : (e + 1) * size].mean(1) for e in range(E)], 1)
        p, ids = logits.softmax(-1), [best(row, 1) for row in logits]
        local = p.mean(0)[E // 2 :].sum()
        return top_k_loop(layer, x, logits, 1), 0.1 * switch_loss(p, ids) - 0.1 * local.log()

    assert_agrees(layer, loop, torch.randn(20, H))


def test_row14_locmoe_gates_are_orthogonal_and_fixed() -> None:
    score, x = GroupedAvgPool(H, E), torch.randn(5, H)
    assert torch.equal(score(x, NOTHING_KNOWN), x.view(5, E, -1).mean(-1))
    rows = torch.func.jacrev(lambda row: score(row[None], NOTHING_KNOWN)[0])(x[0])
    assert torch.equal(rows @ rows.T, torch.eye(E) * E / H)
    assert not [*score.parameters()]
    with raises(ValueError, "hidden_size"):
        GroupedAvgPool(H, 5)


def test_row14_locmoe_capacity_bound() -> None:
    def erfc(z: float) -> float:  # 2/√π ∫_z^∞ exp(-t²) dt, by the trapezoid rule
        t = torch.linspace(z, z + 12, 200_001, dtype=torch.float64)
        return float(torch.trapezoid((-t.square()).exp(), t)) * 2 / math.sqrt(math.pi)

    bounds = [min_capacity(delta, 512, 16) for delta in (0.01, 0.03, 0.05, 0.1)]
    assert bounds == sorted(bounds)
    for delta, bound in zip((0.01, 0.03, 0.05, 0.1), bounds, strict=True):
        assert bound == pytest.approx(1 / (16 * erfc(math.sqrt(512 * delta**2 / (2 - delta**2)))), rel=1e-7)
    with raises(ValueError):
        min_capacity(0.0, 512, 16)


def test_row14_locmoe_keeps_more_tokens_at_home_the_larger_mu() -> None:
    """The gate has no parameters, so the loss changes what comes before it."""

    def share_away(mu: float) -> float:
        torch.manual_seed(0)
        before = nn.Linear(H, H)
        layer = layer_of(presets.locmoe(num_nodes=2, node=0, locality=mu), return_routing=True)
        optimizer, x = torch.optim.Adam(before.parameters(), 1e-2), torch.randn(100, H)
        for _ in range(25):
            y, routing = layer(before(x))
            (y.square().mean() + switchgear.balance_loss(layer)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return (routing.topk_ids >= E // 2).float().mean().item()

    shares = [share_away(mu) for mu in (0.0, 0.1, 10.0)]
    assert shares[0] > shares[1] >= shares[2]


# ---- MoE-X -----------------------------------------------------------------------------------------------------------


def silent_share(weight: Tensor, row: Tensor) -> Tensor:
    """Φ(-mu/sigma) for an expert's weight [I,H] and a token."""
    mean = weight.sum(0) / len(weight)
    mu = row @ mean
    variance = row.square() @ ((weight - mean).square().sum(0) / len(weight))
    return 0.5 * (1 + torch.erf(-mu / variance.sqrt() / math.sqrt(2)))


def test_row22_moe_x_is_a_loop_over_predictions(backend: str) -> None:
    layer = layer_of(presets.moe_x(scale=3.0))

    def loop(layer: Any, x: Tensor) -> Tensor:
        logits = 3 * torch.stack([torch.stack([silent_share(w, row) for w in layer.experts.up_proj]) for row in x])
        return top_k_loop(layer, x, logits, 2)

    assert_agrees(layer, loop, torch.randn(15, H))


def test_row22_moe_x_predicts_how_many_neurons_are_active() -> None:
    layer = switchgear.MoE(32, 256, 16, **presets.moe_x())
    with torch.no_grad():  # Gaussian weights, experts with different means
        layer.experts.up_proj.normal_().add_(torch.randn(16, 1, 32) * 0.5)
    x = torch.randn(40, 32)
    predicted = 1 - layer.gate.score(x, NOTHING_KNOWN)
    measured = (torch.einsum("th,eih->tei", x, layer.experts.up_proj) > 0).float().mean(-1)
    assert torch.corrcoef(torch.stack((predicted.flatten(), measured.flatten())))[0, 1] > 0.9
    with raises(ValueError):
        SparsityAware(H, E)(x, NOTHING_KNOWN)


@pytest.mark.parametrize("gated", [False, True])
def test_row22_biases_are_a_column_of_ones(gated: bool) -> None:
    """W x + b is [W b] [x 1]: the share of the authors, of experts with one more input."""
    layer = switchgear.MoE(H, 24, E, **presets.moe_x() | {"gated": gated, "activation": "relu"}, bias=True).double()
    first = "gate_up_proj" if gated else "up_proj"
    weight, bias = getattr(layer.experts, first), getattr(layer.experts, f"{first}_bias")
    with torch.no_grad():
        bias.normal_().add_(torch.linspace(-2, 2, E, dtype=bias.dtype)[:, None])
    x = torch.randn(9, H, dtype=torch.float64)
    wide = torch.cat((weight, bias[..., None]), -1)[:, :24]
    want = torch.stack([torch.stack([silent_share(w, row) for w in wide]) for row in F.pad(x, (0, 1), value=1.0)])
    torch.testing.assert_close(layer.gate.score(x, NOTHING_KNOWN), want)


def test_row22_moe_x_is_a_wide_network_with_a_block_mask() -> None:
    layer = layer_of(presets.moe_x(), return_routing=True)
    x = torch.randn(9, H)
    y, routing = layer(x)
    mask = torch.zeros(9, E).scatter(1, routing.topk_ids.long(), routing.topk_weights)
    a = (x @ layer.experts.up_proj.flatten(0, 1).T).relu() * mask.repeat_interleave(I, 1)
    torch.testing.assert_close(y, a @ layer.experts.down_proj.mT.flatten(0, 1))


# ---- Autonomy of Experts ---------------------------------------------------------------------------------------------


def autonomous_loop(layer: Any, x: Tensor, over_all: bool = False) -> Any:
    rows, chosen, probabilities = [], [], []
    for row in x:
        low = [down @ row for down in layer.gate.score.down]
        norms = torch.stack([(c * c).sum().sqrt() for c in low])
        p, ids = norms.softmax(-1), best(norms, layer.gate.top_k)
        w = p if over_all else dict(zip(ids, norms[ids].softmax(-1), strict=True))
        y = torch.zeros_like(row)
        for e in ids:
            y = y + w[e] * layer.down_proj[e] @ (F.silu(layer.up[e] @ low[e]) * (layer.v[e] @ row))
        rows.append(y)
        chosen.append(ids)
        probabilities.append(p)
    return torch.stack(rows), 0.1 * switch_loss(torch.stack(probabilities), chosen)


@pytest.mark.parametrize("top_k", [1, 3, E])
def test_row23_autonomy_of_experts_is_a_loop_without_a_router(backend: str, top_k: int) -> None:
    """Algorithm 2: the softmax is over the norms of the chosen experts."""
    layer = layer_of(presets.autonomy_of_experts(top_k=top_k, d_low=5, balance=0.1))
    assert_agrees(layer, autonomous_loop, torch.randn(20, H))


def test_row23_autonomy_of_experts_of_its_code_is_a_softmax_over_all() -> None:
    layer = layer_of(presets.autonomy_of_experts(top_k=3, d_low=5, balance=0.1, normalize=False))
    assert_agrees(layer, partial(autonomous_loop, over_all=True), torch.randn(20, H))


def test_row23_autonomy_of_experts_has_as_many_parameters() -> None:
    def size(layer: nn.Module) -> int:
        return sum(p.numel() for p in layer.parameters())

    options = presets.autonomy_of_experts()
    matched = presets.build(96, 48, 4, **options)
    assert size(matched) == 4 * 3 * 96 * 48  # those of gated experts, without a router
    assert not [name for name, _ in matched.named_parameters() if name.startswith("gate.") and "down" not in name]


def test_row23_autonomy_of_experts_names_bad_options() -> None:
    for name, value in {"d_low": {"d_low": 0}, "activation": {"d_low": 2, "activation": "tanh"}}.items():
        with raises(ValueError, name):
            switchgear.layers.AutonomousMoE(H, I, E, 2, **value)


# ---- bounded gates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["tanh", "sigmoid", "normalize", "layer_norm"])
def test_row24_softmax_gating_theory_gates_on_a_bounded_transform(transform: str) -> None:
    layer = layer_of(presets.bounded_gate(transform=transform))
    bounded = {
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "normalize": lambda x: x / x.square().sum(-1, keepdim=True).sqrt(),
        "layer_norm": lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt(),
    }[transform]

    def loop(layer: Any, x: Tensor) -> Tensor:
        return top_k_loop(layer, x, bounded(x) @ layer.gate.score.weight.T, 2)

    assert_agrees(layer, loop, torch.randn(20, H))


def test_row24_softmax_gating_theory_with_the_identity_is_linear() -> None:
    score, x = Linear(H, E, input_transform=lambda x: x, bias=True), torch.randn(4, H)
    assert torch.equal(score(x, NOTHING_KNOWN), switchgear.gate(x, score.weight, score.bias))
    with raises(ValueError, "input_transform"):
        Linear(H, E, input_transform="cube")


# ---- task-level routing ----------------------------------------------------------------------------------------------


def test_row34_task_level_moe_is_the_chosen_expert(backend: str) -> None:
    layer = layer_of(presets.task_level(dim=6)).eval()
    embedding = torch.randn(3, 6, dtype=torch.float64)

    def loop(layer: Any, x: Tensor) -> Tensor:
        outputs = []
        for task, sequence in zip(embedding, x, strict=True):
            p = layer.gate.score.linear(task).softmax(-1)
            e = best(p, 1)[0]
            straight = 1 + p[e] - p[e].detach()  # weight 1, with the gradient of the probability
            outputs.append(straight * expert(layer.experts, e, sequence))
        return torch.stack(outputs)

    assert_agrees(layer, loop, torch.randn(3, 5, H), embedding=embedding)


def test_row34_task_level_moe_sends_a_task_one_way() -> None:
    layer, x = layer_of(presets.task_level(dim=6), return_routing=True), torch.randn(4, 30, H)
    seen = set()
    for _ in range(20):
        ids = layer(x, embedding=torch.zeros(4, 6))[1].topk_ids.view(4, 30)
        assert (ids == ids[:, :1]).all()
        seen.update(ids[:, 0].tolist())
    assert len(seen) == E  # all are drawn in training
    with raises(ValueError):
        layer(x)
    with raises(ValueError):
        layer(x, embedding=torch.zeros(5, 6))


# ---- scores of papers without a preset -------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_row84_gaussian_gate_is_a_log_density(covariance: str) -> None:
    score, x = Gaussian(4, 3, covariance=covariance).double(), torch.randn(6, 4).double()
    for parameter in score.parameters():
        nn.init.normal_(parameter, std=0.3)
    for e in range(3):
        factor = torch.diag(score.log_std[e].exp())
        if score.lower is not None:
            factor = factor + score.lower[e].tril(-1)
        density = torch.distributions.MultivariateNormal(score.mean[e], scale_tril=factor)
        torch.testing.assert_close(score(x, NOTHING_KNOWN)[:, e], density.log_prob(x))
    assert torch.autograd.gradcheck(lambda x: score(x, NOTHING_KNOWN), (x.requires_grad_(),))


def test_scores_of_scores_are_made_for_each_layer() -> None:
    """A partial with classes is the sum, or the score of the mean, of what the classes make."""
    x, centroids = torch.randn(2, 3, H, dtype=torch.float64), torch.randn(E, 5)
    score = partial(Sum, partial(PerSequence, Linear), partial(Linear, bias=True), partial(ClusterPrior, centroids))
    router, other = (switchgear.Router(H, E, 2, score=score, dtype=torch.float64) for _ in range(2))
    tensors = [*router.parameters(), *router.buffers()]
    assert [tensor.dtype for tensor in tensors] == [torch.float64] * 4
    assert not {t.data_ptr() for t in tensors} & {t.data_ptr() for t in (*other.parameters(), *other.buffers())}
    of_mean, linear, prior = router.score.scores
    embedding = torch.randn(2, 5, dtype=torch.float64)
    near = F.normalize(embedding, dim=-1) @ F.normalize(prior.centroids, dim=-1).T
    wanted = x.mean(1, keepdim=True) @ of_mean.score.weight.T + x @ linear.weight.T + linear.bias + near[:, None]
    got = router(x, Context(embedding=embedding)).router_logits
    torch.testing.assert_close(got, wanted.flatten(0, 1))
    with raises(ValueError, "centroids"):
        switchgear.Router(H, E + 1, 2, score=score)


def test_row84_gaussian_gate_far_from_zero_is_as_exact() -> None:
    score, x = Gaussian(64, 3), 100 + torch.randn(6, 64)
    nn.init.normal_(score.mean, mean=100.0)
    exact = copy.deepcopy(score).double()(x.double(), NOTHING_KNOWN)
    squares = (x[:, None] - score.mean).double().square().sum(-1)
    error = (score(x, NOTHING_KNOWN).double() - exact).abs()
    assert (error <= 64 * torch.finfo(torch.float32).eps * squares).all()


def test_row59_nexus_adds_an_expert_without_touching_the_others() -> None:
    score, x = Domain(H, 3, domain_embeddings=torch.randn(3, 5)), torch.randn(7, H)
    before = score(x, NOTHING_KNOWN)
    d = score.domain_embeddings[1]
    e = score.down.weight @ (F.silu(score.gate.weight @ d) * (score.up.weight @ d))
    torch.testing.assert_close(before[:, 1], x @ e)
    score.add_expert(torch.randn(5))
    after = score(x, NOTHING_KNOWN)
    assert after.shape == (7, 4)
    torch.testing.assert_close(after[:, :3], before)
    with raises(ValueError, "domain_embeddings"):
        Domain(H, 4, domain_embeddings=torch.randn(3, 5))


def test_row68_phatgoose_compares_standardised_gates() -> None:
    score, x = PosthocGate(H, E), torch.randn(7, H)
    nn.init.normal_(score.gates, std=3)

    def standardised(v: Tensor) -> Tensor:
        return (v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt()

    gates = score.gates.detach()
    wanted = torch.tensor([[standardised(g) @ standardised(row) / math.sqrt(H) for g in gates] for row in x])
    torch.testing.assert_close(score(x, NOTHING_KNOWN), wanted)


def test_sums_priors_and_scores_of_sequences() -> None:
    x, embedding = torch.randn(6, H), torch.randn(2, 5)
    prior, linear = ClusterPrior(torch.randn(E, 5), weight=2.0, tau=0.5), Linear(H, E)
    context = Context(embedding=embedding, sequence_length=3)
    near = torch.cosine_similarity(embedding[:, None], prior.centroids, dim=-1) * 4
    torch.testing.assert_close(prior(x, context), near.repeat_interleave(3, 0))
    torch.testing.assert_close(Sum(prior, linear)(x, context), near.repeat_interleave(3, 0) + linear(x, context))
    mean = x.view(2, 3, H).mean(1)
    torch.testing.assert_close(PerSequence(linear)(x, context), linear(mean, context).repeat_interleave(3, 0))
    ids = Context(sequence_ids=torch.tensor([7, -2, 7, 7, -2, -2]))
    mean = torch.stack([x[ids.sequence_ids == s].mean(0) for s in (7, -2, 7, 7, -2, -2)])
    torch.testing.assert_close(PerSequence(linear)(x, ids), linear(mean, ids))
    router = switchgear.Router(H, E, 2, score=PerSequence(linear))  # without a selection: the length comes from x
    assert (
        router(x.view(2, 3, H)).topk_ids.view(2, 3, 2) == router(x.view(2, 3, H)).topk_ids.view(2, 3, 2)[:, :1]
    ).all()


def test_jitter_and_noise_are_of_training_alone() -> None:
    x = torch.randn(2000, H)
    score = Linear(H, E, jitter=0.25)
    generator = torch.Generator().manual_seed(3)
    noisy = score(x, Context(generator=generator))
    generator.manual_seed(3)
    noise = torch.empty_like(x).uniform_(0.75, 1.25, generator=generator)
    torch.testing.assert_close(noisy, (x * noise) @ score.weight.T)
    assert torch.equal(score.eval()(x, NOTHING_KNOWN), switchgear.gate(x, score.weight))
    score = Linear(H, E, noise=True)
    nn.init.normal_(score.noise_weight)
    scale = F.softplus(x @ score.noise_weight.T)
    deviation = ((score(x, NOTHING_KNOWN) - x @ score.weight.T) / scale).std()
    assert deviation.item() == pytest.approx(1, rel=0.02)
    assert torch.equal(score.eval()(x, NOTHING_KNOWN), switchgear.gate(x, score.weight))


@pytest.mark.parametrize(
    ("name", "make"),
    {
        "jitter": partial(Linear, H, E, jitter=1.0),
        "normalize": partial(Linear, H, E, normalize="max"),
        "tau": partial(Cosine, H, E, tau=0.0),
        "num_groups": partial(switchgear.routing.SwitchMixture, H, E, num_groups=3),
        "covariance": partial(Gaussian, H, E, covariance="round"),
        "dim": partial(FromEmbedding, H, E, dim=0),
        "d_low": partial(ActivationNorm, H, E, d_low=0),
    }.items(),
)
def test_bad_options_of_scores_are_named(name: str, make: Any) -> None:
    with raises(ValueError, name):
        make()
