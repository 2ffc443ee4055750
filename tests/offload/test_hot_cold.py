# SPDX-License-Identifier: BSD-3-Clause
"""HotColdSplit: the output of any split, bytes, and the automatic threshold against every other."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from queued_device import QueuedDevice
from staging_mistakes import MISTAKES, Mistake, planted
from torch import Tensor, nn
from torch.nn.utils import parametrize

import switchgear
from errors import raises
from switchgear import MoE, finetune
from switchgear.adapters import add_lora
from switchgear.experts import Experts
from switchgear.offload import HotColdSplit, SplitCost, hot_cold

E, K, H, I = 8, 2, 16, 8  # noqa: E741


def skewed(num_tokens: int = 40, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    odds = 1 / torch.arange(1, E + 1).float() ** 2
    ids = torch.multinomial(odds.expand(num_tokens, -1), K, generator=generator).int()
    ids[0, 1] = -1
    return torch.randn(num_tokens, H, generator=generator), ids, torch.rand(num_tokens, K, generator=generator)


def experts_of(**options: Any) -> Experts:
    torch.manual_seed(0)
    return Experts(H, I, E, **options)


def counts_of(ids: Tensor) -> list[int]:
    return [int((ids == e).sum()) for e in range(E)]


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"gated": False}, {"transposed": True}, {"interleaved": True, "limit": 2.0}],
    ids=str,
)
def test_row43_the_output_does_not_depend_on_the_split(options: dict[str, Any]) -> None:
    experts = experts_of(**options)
    x, ids, weights = skewed()
    wanted = experts(x, ids, weights)
    # 0: all are hot; 1000: none is.
    for threshold in (0, 1, 3, 10, 1000, "auto", "bytes"):
        split = HotColdSplit(experts, "cpu", threshold, SplitCost(1e6, 1e9, 1e9))
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                y = split(x, ids, weights)
            # A sum of K products in two parts: one rounding more.
            torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert split(x, ids, weights).dtype == experts(x, ids, weights).dtype
    empty = split(x[:0], ids[:0], weights[:0])
    assert empty.shape == (0, H)


def test_leading_dimensions_are_those_of_the_experts() -> None:
    experts = experts_of()
    x, ids, weights = (tensor.reshape(4, 10, -1) for tensor in skewed())
    for threshold in (0, 5, 1000):
        y = HotColdSplit(experts, "cpu", threshold)(x, ids, weights)
        torch.testing.assert_close(y, experts(x, ids, weights), rtol=1e-5, atol=1e-6)


def test_row43_gradients_and_the_layer() -> None:
    torch.manual_seed(0)
    moe = MoE(H, I, E, K)
    x = torch.randn(30, H, requires_grad=True)
    inputs = [x, *moe.parameters()]
    wanted = torch.autograd.grad(moe(x).square().sum(), inputs)
    moe.experts = HotColdSplit(moe.experts, "cpu", 8)
    for got, expected in zip(torch.autograd.grad(moe(x).square().sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row43_cold_are_exactly_those_whose_rows_are_fewer_bytes(dtype: torch.dtype) -> None:
    """n_e·2·H·b < params·b, on counts around the boundary: params = 3·H·I, so n_e < 1.5·I = 12."""
    experts = experts_of(dtype=dtype)
    split = HotColdSplit(experts, "cpu", "bytes")
    counts = [0, 1, 11, 12, 13, 40, 11, 12]
    ids = torch.tensor([e for e, count in enumerate(counts) for _ in range(count)])[:, None].int()
    item = experts.down_proj.element_size()
    hot = split.hot_experts(ids)
    for e, count in enumerate(counts):
        activations = count * 2 * H * item
        parameters = (experts.gate_up_proj[e].numel() + experts.down_proj[e].numel()) * item
        assert (e in hot) == (count > 0 and activations >= parameters)


@pytest.mark.parametrize("seed", range(8))
def test_row43_the_threshold_takes_least_of_all(seed: int) -> None:
    """The paper's choice, by search: each number of tokens as a threshold, and each number of hot experts."""
    generator = torch.Generator().manual_seed(seed)
    cost = SplitCost(*(10 ** (6 + 3 * torch.rand(3, generator=generator))).tolist())
    experts = experts_of()
    split = HotColdSplit(experts, "cpu", "auto", cost)
    params = 3 * H * I
    for num_tokens in (1, 4, 40, 400):
        _, ids, _ = skewed(num_tokens, seed)
        counts = counts_of(ids)

        def seconds(hot: list[int], counts: list[int] = counts) -> float:
            fast = sum(params * 4 / cost.bandwidth + 2 * counts[e] * params / cost.hot_flops for e in hot)
            cold = [e for e in range(E) if e not in hot]
            slow = sum(counts[e] * (2 * H * 4 / cost.bandwidth + 2 * params / cost.cold_flops) for e in cold)
            return max(fast, slow)

        found = seconds(split.hot_experts(ids))
        order = sorted((e for e in range(E) if counts[e]), key=lambda e: -counts[e])
        by_number = [seconds(order[:number]) for number in range(len(order) + 1)]
        by_tokens = [seconds([e for e in order if counts[e] >= least]) for least in range(max(counts) + 2)]
        assert found == pytest.approx(min(by_number + by_tokens), rel=1e-9)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_pinned", [False, True])
def test_row43_a_gpu_and_the_host_at_once(is_pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients the parts are queued on streams; with them torch copies."""
    device = QueuedDevice(1, is_eager=True)
    device.has_pinned = is_pinned
    monkeypatch.setattr(hot_cold, "find_device", lambda _: device)
    experts = experts_of(bias=True)
    x, ids, weights = skewed()
    for threshold in (0, 3, 10, 1000):
        split = HotColdSplit(experts, "cpu", threshold)
        for mode in (torch.no_grad, torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                torch.testing.assert_close(split(x, ids, weights), experts(x, ids, weights), rtol=1e-5, atol=1e-6)
        if threshold < 1000:
            assert split._mover is not None
            assert copy.deepcopy(split)._mover is None


@pytest.mark.parametrize("seed", range(12))
def test_row43_both_parts_find_their_numbers(seed: int) -> None:
    """On streams that run late and in any order: experts on the device, rows on the host, the part that returns."""
    device, chance, wrong = QueuedDevice(seed), random.Random(seed), []
    device.has_pinned = seed % 4 == 3
    params = {"gate_up_proj": torch.randn(E, 5, 7), "down_proj": torch.randn(E, 3)}
    mover = hot_cold.Mover(device, params)
    for step in range(20):
        hot = sorted(chance.sample(range(E), chance.randrange(1, E)))
        x, values = device.empty((4,), torch.float32), torch.full((4,), float(step))
        device.current.run(lambda x=x, values=values: x.copy_(values))  # type: ignore[misc]

        def launch(hot: list[int] = hot, x: Tensor = x) -> Tensor:
            moved, y = mover.move(params, hot), device.empty((4,), torch.float32)

            def kernel() -> None:
                wrong.extend(name for name in params if not torch.equal(moved[name], params[name][hot]))
                y.copy_(2 * x)

            device.current.run(kernel)
            return y

        def multiply(x: Tensor, values: Tensor = values) -> Tensor:
            if not torch.equal(x, values):
                wrong.append("rows")
            return 3 * x

        y, part = hot_cold.overlap(device, (x,), launch, multiply)

        def add(y: Tensor = y, part: Tensor = part, values: Tensor = values) -> None:
            if not torch.equal(y + part, 5 * values):
                wrong.append("sum")

        device.current.run(add)
    device.synchronize()
    assert not wrong


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m.file == "hot_cold.py"], ids=lambda mistake: mistake.name)
def test_a_mistake_is_detected(mistake: Mistake) -> None:
    def fails(seed: int) -> bool:
        try:
            test_row43_both_parts_find_their_numbers(seed)
        except AssertionError:
            return True
        return False

    with planted(mistake):
        assert any(map(fails, range(12)))


def parametrized(moe: MoE) -> None:
    parametrize.register_parametrization(moe.experts, "down_proj", nn.Identity())


CHANGES = {
    "expected experts without adapters": lambda moe: add_lora(moe, rank=2),
    "expected plain weights, got int8; call switchgear.restore": lambda moe: switchgear.store(moe, "int8"),
    "expected no experts that train alone": lambda moe: finetune.freeze_except(moe, {"experts": [1]}),
    "expected plain weights, got a down_proj that is computed": parametrized,
    f"expected all {2 * E} of a layer, got {E} of a rank": lambda moe: setattr(moe.experts, "num_experts", 2 * E),
}


@pytest.mark.parametrize("words", CHANGES)
def test_experts_that_are_more_than_their_parameters_are_refused(words: str) -> None:
    """Before the split, and at a call if they change under it."""
    moe = MoE(H, I, E, K)
    split = HotColdSplit(moe.experts, "cpu", 1)  # type: ignore[arg-type]
    CHANGES[words](moe)
    for call in (lambda: HotColdSplit(moe.experts, "cpu", 1), lambda: split(*skewed())):  # type: ignore[arg-type]
        with raises(ValueError, "experts"):
            call()


def test_bad_input() -> None:
    experts = experts_of()
    for words, call in [
        ("threshold", lambda: HotColdSplit(experts, "cpu", "best")),
        ("threshold", lambda: HotColdSplit(experts, "cpu", -1)),
        ("bandwidth", lambda: SplitCost(bandwidth=0)),
    ]:
        with raises(ValueError, words):
            call()
    for wrong in (E, E + 1, -2):
        ids = torch.tensor([[-1, 0], [1, wrong]])
        with raises(ValueError, "topk_ids"):
            HotColdSplit(experts, "cpu")(torch.zeros(2, H), ids, torch.ones(2, K))
    for device in ("meta", "foo"):
        with raises(ValueError, "hot"):
            HotColdSplit(experts, device)
    for threshold in (float("nan"), True, 1.5):
        with raises(TypeError, "threshold"):
            HotColdSplit(experts, "cpu", threshold)  # type: ignore[arg-type]
    with raises(TypeError, "cost"):
        HotColdSplit(experts, "cpu", cost=5)  # type: ignore[arg-type]
    with raises(TypeError, "experts"):
        HotColdSplit(MoE(H, I, E, K), "cpu")  # type: ignore[arg-type]
