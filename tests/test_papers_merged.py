# SPDX-License-Identifier: BSD-3-Clause
"""MEO (row 49): experts merged once per sequence, against float64 loops of the paper's formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import switchgear
from errors import raises
from loops import E, H, I, assert_agrees
from switchgear import presets
from switchgear.experts import Experts
from switchgear.layers import MergedExperts

K = 3


def layer_of(**options: Any) -> MergedExperts:
    layer = presets.build(H, I, E, **presets.merged(top_k=K, **options), activation="relu", gated=False, bias=True)
    for name, parameter in layer.named_parameters():
        if name.startswith(("attention", "bottleneck")):
            nn.init.normal_(parameter, std=0.5)
    return layer


def weight_of(router: Any) -> Tensor:
    return router.weight if router.score is None else router.score.weight


def average(vectors: Tensor, scores: Tensor) -> Tensor:
    """Σ_t softmax(scores)_t · vectors_t."""
    return sum(w * v for w, v in zip(scores.flatten().softmax(0), vectors, strict=True))


def gates(logits: Tensor) -> list[tuple[int, Tensor]]:
    """The K largest logits' experts, and the softmax over these logits alone."""
    ids = sorted(range(E), key=lambda e: -float(logits[e].detach()))[:K]
    powers = [logits[e].exp() for e in ids]
    return [(e, p / sum(powers)) for e, p in zip(ids, powers, strict=True)]


def meo(layer: MergedExperts, x: Tensor) -> tuple[Tensor, Tensor]:
    """y [B,L,H], and the total weight of each expert [2,E] at both projections."""
    experts, outputs, total = layer.experts, [], x.new_zeros(2, E)
    for tokens in x:
        if layer.bottleneck_in is not None:
            inner = (tokens @ layer.bottleneck_in.weight.T + layer.bottleneck_in.bias).relu()
            tokens = tokens + inner @ layer.bottleneck_out.weight.T + layer.bottleneck_out.bias
        scores = x.new_zeros(len(tokens), 1) if layer.attention is None else tokens @ layer.attention.weight.T
        chosen = gates(weight_of(layer.router) @ average(tokens, scores))
        h = sum(g * experts.up_proj[e] for e, g in chosen) @ tokens.T
        a = (h + sum(g * experts.up_proj_bias[e] for e, g in chosen)[:, None]).relu().T
        total = total + one_hot(chosen, 0, total)
        if layer.down_router is not None:
            chosen = gates(weight_of(layer.down_router) @ average(a, scores))
            total = total + one_hot(chosen, 1, total)
        down = sum(g * experts.down_proj[e] for e, g in chosen)
        outputs.append(a @ down.T + sum(g * experts.down_proj_bias[e] for e, g in chosen))
    return torch.stack(outputs), total


def one_hot(chosen: list[tuple[int, Tensor]], row: int, like: Tensor) -> Tensor:
    out = torch.zeros_like(like)
    for e, g in chosen:
        out = out.index_put((torch.tensor(row), torch.tensor(e)), g)
    return out


@pytest.mark.parametrize("bottleneck", [0, 4])
@pytest.mark.parametrize("pooling", ["mean", "attention"])
@pytest.mark.parametrize("per_linear", [False, True])
def test_row49_meo_merges_by_a_softmax_over_the_chosen_logits(
    backend: str, per_linear: bool, pooling: str, bottleneck: int
) -> None:
    layer = layer_of(per_linear=per_linear, pooling=pooling, bottleneck=bottleneck)
    assert_agrees(layer, lambda layer, x: meo(layer, x)[0], torch.randn(3, 5, H))


def test_row49_meo_of_equal_experts_is_one_expert(backend: str) -> None:
    """Weights sum to 1, so nothing shrinks: with the softmax over all experts, |y| was a few percent of this."""
    layer = presets.build(H, I, E, **presets.merged(top_k=K))
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    x = torch.randn(2, 5, H)
    first = torch.zeros(10, 1, dtype=torch.int32)
    wanted = layer.experts(x.view(-1, H), first, torch.ones(10, 1)).view(x.shape)
    torch.testing.assert_close(layer(x), wanted)


def test_row49_meo_penalises_the_variation_of_weights() -> None:
    layer = layer_of(per_linear=True, importance=0.1)

    def loop(layer: MergedExperts, x: Tensor) -> tuple[Tensor, Tensor]:
        y, total = meo(layer, x)
        return y, 0.1 * sum(((row - row.mean()) ** 2).mean() / row.mean() ** 2 for row in total)

    assert_agrees(layer, loop, torch.randn(4, 5, H))
    layer(torch.randn(4, 5, H))
    assert set(layer.losses) == {"importance_load", "down_importance_load"}


def test_row49_meo_penalises_the_variation_of_the_smooth_load_with_noise() -> None:
    """Of the probabilities that each expert is among the best K if its own noise is drawn again. Its code adds 0.01 to
    the noise, and has the unbiased variance."""
    layer, x = layer_of(noise=True, importance=0.1).double(), torch.randn(4, 5, H, dtype=torch.float64)
    torch.manual_seed(3)
    layer(x)
    found = layer.losses["importance_load"]
    torch.manual_seed(3)
    score, means = layer.router.score, x.mean(1)
    clean, deviation = means @ score.weight.T, nn.functional.softplus(means @ score.noise_weight.T)
    noisy = clean + torch.randn_like(clean) * deviation
    weights, load = torch.zeros(E, dtype=torch.float64), torch.zeros(E, dtype=torch.float64)
    for row, own, spread in zip(noisy, clean, deviation, strict=True):
        for e, gate in gates(row):
            weights[e] += gate.detach()
        for e in range(E):
            best = torch.cat((row[:e], row[e + 1 :])).sort(descending=True).values
            load[e] += torch.distributions.Normal(0.0, 1.0).cdf((own[e] - best[K - 1]) / spread[e]).detach()
    expected = 0.1 * sum(total.var(correction=0) / total.mean() ** 2 for total in (weights, load))
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_row49_a_bottleneck_starts_as_nothing() -> None:
    layer = presets.build(H, I, E, **presets.merged(bottleneck=4))
    assert layer.bottleneck_in.weight.any()
    assert not any(p.any() for p in (layer.bottleneck_in.bias, *layer.bottleneck_out.parameters()))


def test_row49_meo_draws_noise_in_training_alone() -> None:
    layer, x = layer_of(noise=True), torch.randn(4, 5, H)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), meo(layer, x)[0])


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_row49_meo_in_bfloat16_sees_all_tokens_of_a_long_sequence(pooling: str) -> None:
    """Sums are float32: in bfloat16, 256 + 1 is 256, and devices that add so would count the first tokens alone."""
    layer, x = layer_of(per_linear=True, pooling=pooling).bfloat16(), torch.randn(1, 2, H).bfloat16()
    x = x.repeat_interleave(500, 1)
    torch.testing.assert_close(layer(x.flip(1)).flip(1), layer(x))
    assert layer.shares(x[0], torch.zeros(1000, dtype=torch.int64), 1).dtype is torch.float32


def test_row49_meo_of_tokens_in_any_order() -> None:
    """Sequences of different lengths, by numbers of their own or by promised ones."""
    layer, x = layer_of().double().eval(), torch.randn(9, H, dtype=torch.float64)
    ids = torch.tensor([2, 0, 2, 1, 1, 2, 0, 2, 1])
    wanted = torch.empty_like(x)
    for sequence in range(3):
        wanted[ids == sequence] = meo(layer, x[ids == sequence][None])[0][0]
    torch.testing.assert_close(layer(x, sequence_ids=ids), wanted)
    torch.testing.assert_close(layer(x, 7 - 3 * ids), wanted)
    torch.testing.assert_close(layer(x, ids.int(), num_sequences=5), wanted)


def test_row49_meo_names_wrong_sequences() -> None:
    layer, x, ids = layer_of(), torch.randn(4, H), torch.tensor([0, 0, 1, 1])
    for wrong, error, message in (
        ((ids[:3],), ValueError, "sequence_ids"),
        ((ids, 1), ValueError, "sequence_ids"),
        ((ids.float(),), TypeError, "sequence_ids"),
        ((ids.tolist(),), TypeError, "sequence_ids"),
    ):
        with raises(error, message):
            layer(x, *wrong)


def test_row49_meo_names_a_router_of_the_wrong_width() -> None:
    experts, router = Experts(H, I, E), switchgear.Router(H, E, 2, normalize=True)
    for name, wrong in {
        "router": {"router": switchgear.Router(I, E, 2)},
        "down_router": {"down_router": router},
        "pooling": {"pooling": "max"},
        "bottleneck": {"bottleneck": -1},
    }.items():
        with raises(ValueError, name):
            MergedExperts(**{"router": router, "experts": experts, **wrong})


def test_two_routers_under_autocast() -> None:
    """Hidden activations are bfloat16 then, shares of tokens are not."""
    layer, x = layer_of(per_linear=True, pooling="attention"), torch.randn(2, 5, H)
    wanted = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=2**-5 * float(wanted.detach().abs().max()))
