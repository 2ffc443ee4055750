# SPDX-License-Identifier: BSD-3-Clause
"""Papers about balance, as whole layers: against float64 loops, and by their claims. test_balance.py tests the losses
as formulas."""

from __future__ import annotations

import copy
import io
import math
import socket
import threading
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import switchgear
from errors import raises
from loops import E, H, I, assert_agrees, best, expert, layer_of, mixture, switch_loss
from switchgear import presets
from switchgear.functional import Routing
from switchgear.layers import HeterogeneousExperts, Monet
from switchgear.routing import (
    AdaptiveCoefficient,
    AdaptiveSparsity,
    Broadcast,
    Capacity,
    ClusterDropout,
    ClusterVariance,
    Dense,
    GradientConflict,
    LossFreeBias,
    Masked,
    NullAwareSwitchLoss,
    QuantileBias,
    Random,
    RunningCap,
    RunningThreshold,
    SwitchLoss,
    Temperature,
    TopK,
    max_violation,
)
from switchgear.routing.balance import count_tokens
from switchgear.routing.context import NOTHING_KNOWN, Context


def chosen(p: Tensor, count: int) -> tuple[list[list[int]], list[Tensor]]:
    ids = [best(row, count) for row in p]
    return ids, [p[t, choice] for t, choice in enumerate(ids)]


def feed_forward(module: Any, x: Tensor) -> Tensor:
    hidden = F.silu(x @ module.gate_proj.weight.T) * (x @ module.up_proj.weight.T)
    return hidden @ module.down_proj.weight.T


# ---- loss-free balancing ---------------------------------------------------------------------------------------------


def test_row4_loss_free_balancing_chooses_by_the_bias_alone(backend: str) -> None:
    layer = layer_of(presets.loss_free(top_k=3))
    with torch.no_grad():
        layer.gate.e_score_correction_bias.copy_(torch.randn(E))

    def loop(layer: Any, x: Tensor) -> Tensor:
        s = (x @ layer.gate.weight.T).sigmoid()
        ids = [best(row, 3) for row in s + layer.gate.e_score_correction_bias]
        return mixture(layer.experts, x, ids, [s[t, choice] for t, choice in enumerate(ids)])

    assert_agrees(layer, loop, torch.randn(20, H))
    assert layer.losses == {}


def test_row4_loss_free_balancing_leaves_gradients_alone() -> None:
    """For the same choice the gradient of the logits is the same, with and without a bias."""
    logits = torch.randn(20, E, requires_grad=True)
    bias = torch.full((E,), 0.7)  # shifts all experts equally
    plain, biased = (TopK(3, "sigmoid")(logits, NOTHING_KNOWN, b) for b in (None, bias))
    assert torch.equal(plain.topk_ids, biased.topk_ids)
    grads = [torch.autograd.grad(r.topk_weights.square().sum(), logits)[0] for r in (plain, biased)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_row4_loss_free_balancing_evens_a_skewed_router(rule: str) -> None:
    layer = layer_of(presets.loss_free(top_k=2, rate=0.003 if rule == "sign" else 0.01, rule=rule), return_routing=True)
    x = torch.randn(512, H) + 1
    counts = count_tokens(layer(x)[1].topk_ids, E)
    layer.gate.tokens_per_expert.zero_()
    assert max_violation(counts) > 0.5
    for _ in range(300):
        routing = layer(x)[1]
        switchgear.after_step(layer)
    assert max_violation(count_tokens(routing.topk_ids, E)) < 0.1
    again = layer_of(presets.loss_free(top_k=2), return_routing=True)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x)[1].topk_ids, layer(x)[1].topk_ids)


def test_row4_loss_free_balancing_moves_by_the_rate() -> None:
    router = switchgear.Router(H, 4, 1, balance=[LossFreeBias(0.25)])
    router.tokens_per_expert.copy_(torch.tensor([10, 2, 4, 0]))
    router.after_step()
    assert router.e_score_correction_bias.tolist() == [-0.25, 0.25, 0.0, 0.25]
    assert not router.tokens_per_expert.any()
    router.balance = [LossFreeBias(0.25, rule="proportional")]
    router.tokens_per_expert.copy_(torch.tensor([0, 0, 1, 1]))  # means below 1 divide, too
    router.after_step()
    assert router.e_score_correction_bias.tolist() == [0.0, 0.5, -0.25, 0.0]
    router.after_step()
    assert router.e_score_correction_bias.tolist() == [0.0, 0.5, -0.25, 0.0]
    with raises(ValueError):
        LossFreeBias(rule="cubic")


def test_quantile_balancing_is_the_quantile_of_what_each_token_asks_for(isa: str) -> None:
    """By sorting, over two calls of different sizes; the histogram is as exact as its bins."""
    layer = layer_of(presets.quantile_balance(top_k=2), return_routing=True)
    bias, width = torch.linspace(-0.3, 0.3, E), 2.6 / 1000
    layer.gate.balance[0].bias.copy_(bias)
    layer.gate.e_score_correction_bias.copy_(bias)
    calls, asked = (torch.randn(300, H), torch.randn(100, H)), [[] for _ in range(E)]
    for x in calls:
        layer(x)
        for row in (x @ layer.gate.weight.T).sigmoid().detach():
            cutoff = sorted((row + bias).tolist())[-3]
            for e in range(E):
                asked[e].append(cutoff - float(row[e]))
    switchgear.after_step(layer)
    wanted = torch.tensor([sorted(values)[400 * 2 // E - 1] for values in asked])
    found = layer.gate.e_score_correction_bias
    torch.testing.assert_close(found, wanted - wanted.mean(), atol=2 * width, rtol=0)
    assert torch.equal(found, layer.gate.balance[0].bias)
    switchgear.after_step(layer)  # without a call
    assert torch.equal(found, layer.gate.balance[0].bias)


def test_quantile_balancing_evens_a_skewed_router_in_few_steps() -> None:
    layer = layer_of(presets.quantile_balance(top_k=2), return_routing=True)
    x = torch.randn(512, H) + 1
    assert max_violation(count_tokens(layer(x)[1].topk_ids, E)) > 0.5
    for _ in range(10):
        switchgear.after_step(layer)
        routing = layer(x)[1]
    assert max_violation(count_tokens(routing.topk_ids, E)) < 0.1
    assert routing.losses == {}
    again = layer_of(presets.quantile_balance(top_k=2), return_routing=True)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x)[1].topk_ids, routing.topk_ids)


def test_a_balance_that_is_changed_in_training_takes_effect() -> None:
    """The rate of the bias falls to 0, as at the end of DeepSeek-V3's training; then other parts come and go."""
    router, x = switchgear.Router(H, E, 2, balance=[LossFreeBias(0.1)]), torch.randn(7, H)
    router(x)
    router.after_step()
    router(x)
    bias, counts = router.e_score_correction_bias.clone(), router.tokens_per_expert.clone()
    router.balance = [LossFreeBias(0.0)]
    assert torch.equal(router.tokens_per_expert, counts)
    router.after_step()
    assert bias.any()
    assert torch.equal(router.e_score_correction_bias, bias)
    router.balance = [partial(SwitchLoss, partial(AdaptiveCoefficient, initial=0.5)), LossFreeBias(0.1)]
    again = switchgear.Router(H, E, 2, balance=[partial(SwitchLoss, AdaptiveCoefficient), LossFreeBias(0.1)])
    again.load_state_dict(router.state_dict())
    assert again.balance[0].coefficient.value == 0.5
    router(x).losses["switch"].backward()
    assert router.weight.grad.any()
    router.after_step()
    assert not torch.equal(router.e_score_correction_bias, bias)
    assert router.balance[0].coefficient.value < 0.5
    router.balance = []
    assert router.tokens_per_expert is None
    assert list(router.state_dict()) == ["weight", "e_score_correction_bias"]
    assert router(x).losses == {}
    with pytest.raises(AttributeError):
        router.balance.append(LossFreeBias())  # would be ignored


def test_a_router_without_controllers_gets_them_in_training() -> None:
    router, x = switchgear.Router(H, E, 2), torch.randn(7, H)
    balance = [LossFreeBias(0.1), partial(SwitchLoss, scope="global", accumulate=True)]
    router.balance = balance
    given = switchgear.Router(H, E, 2, balance=balance)
    given.load_state_dict(router.state_dict())
    for each in (router, copy.deepcopy(router), given):
        each(x)
        each.after_step()
        assert not each.balance[1].has_counts
        assert torch.equal(each.e_score_correction_bias, router.e_score_correction_bias)
    assert router.e_score_correction_bias.any()


def test_select_and_capacity_may_change_in_training() -> None:
    router, x = switchgear.Router(H, E, select=Temperature(TopK(2))), torch.randn(7, H)
    router.capacity = partial(Capacity, 0.5)
    assert int(router(x).num_dropped) > 0
    router.capacity = None
    router.select = TopK(3)  # no module, in the place of one
    assert router(x).topk_ids.shape == (7, 3)
    assert list(router.state_dict()) == ["weight"]
    router.select = partial(RunningCap, TopK(1), math.inf)
    assert list(router.state_dict()) == ["weight", "select.totals"]
    assert router(x).topk_ids.shape == (7, 1)
    assert router.select.totals.sum() > 0


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("balance", 0.01, TypeError),
        ("balance", [0.01], TypeError),
        ("capacity", 1.25, TypeError),
        ("select", Dense(), ValueError),
        ("select", None, ValueError),
    ],
)
def test_a_change_that_is_refused_changes_nothing(name: str, value: Any, error: type[Exception]) -> None:
    router = switchgear.Router(H, E, select=TopK(2), balance=[LossFreeBias(0.1), SwitchLoss()])
    before, state = getattr(router, name), copy.deepcopy(router.state_dict())
    with raises(error, name):
        setattr(router, name, value)
    with raises(error, name):
        router.set_policy(**{"capacity": None, name: value})
    assert getattr(router, name) is before
    assert str(router.state_dict()) == str(state)


def test_a_policy_changes_as_a_whole() -> None:
    router = switchgear.Router(H, E, 2, balance=[LossFreeBias(0.1)])
    router.set_policy(select=TopK(3), capacity=Capacity(0.5), balance=[*router.balance, SwitchLoss()])
    assert (router.select, router.capacity, len(router.balance)) == (TopK(3), Capacity(0.5), 2)
    with raises(TypeError, "score"):
        router.set_policy(score=None)


def test_a_router_that_chose_without_logits_has_none_to_choose_by() -> None:
    router = switchgear.Router(H, E, select=Random(2))
    with raises(ValueError, "select"):
        router.select = TopK(2)
    router.select = Random(3)
    assert router(torch.randn(5, H)).topk_ids.shape == (5, 3)


def test_losses_may_come_from_a_generator() -> None:
    router = switchgear.Router(H, E, 2, balance=(SwitchLoss(rate) for rate in (0.1, 0.2)))
    assert [loss.coefficient for loss in router.balance] == [0.1, 0.2]
    router.balance = (SwitchLoss(rate) for rate in (0.3,))
    assert [loss.coefficient for loss in router.balance] == [0.3]


def test_subclasses_may_define_parts_of_a_router() -> None:
    class Unlimited(switchgear.Router):
        capacity = None

    class First(switchgear.Router):
        def select(self, router_logits: Tensor, context: Any, bias: Any = None) -> Any:
            return TopK(1)(router_logits, context, bias)

    assert Unlimited(H, E, 2)(torch.randn(5, H)).topk_ids.shape == (5, 2)
    assert First(H, E, 2)(torch.randn(5, H)).topk_ids.shape == (5, 2)  # the option, as always


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_controllers_step_by_the_same_amounts_in_a_model_of_another_dtype(dtype: torch.dtype) -> None:
    """Near 1/32 a step of bfloat16 is 2^-13, more than two rates of 1e-4."""
    bias = torch.full((E,), 1 / 32) + torch.arange(E) * 1e-5

    def stepped(dtype: torch.dtype) -> dict[str, Tensor]:
        sparsity = partial(AdaptiveSparsity, 2, initial=0.3)
        select = partial(RunningCap, TopK(2), 1.0)
        router = switchgear.Router(H, E, select=select, balance=[*controlled().balance, LossFreeBias(1e-4), sparsity])
        router.e_score_correction_bias.copy_(bias)
        router.select.totals.copy_(bias)
        router.to(dtype)
        router.tokens_per_expert.copy_(torch.arange(E))
        for controller in router.balance_modules:
            for part in controller.modules():
                part._seen = torch.tensor([3, 7])
        router.after_step()
        return {name: value for name, value in router.state_dict().items() if name != "weight"}

    wanted = stepped(torch.float32)
    assert len(wanted) == 4
    found = stepped(dtype)
    for name, value in wanted.items():
        assert found[name].dtype is torch.float32
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_buffers_stay_float32_when_a_state_of_16_bits_is_assigned(device: str) -> None:
    state = {name: value.bfloat16() for name, value in controlled().state_dict().items()}
    router = controlled().to(device)
    router.load_state_dict(state, assign=True)
    assert router.weight.dtype is torch.bfloat16
    for name, buffer in router.named_buffers():
        assert buffer.dtype is torch.float32
        assert torch.equal(buffer, state[name].float()), name


def test_buffers_that_stay_float32_follow_a_model_to_another_device() -> None:
    router = controlled().bfloat16()
    assert router.to("meta", torch.float16).e_score_correction_bias.is_meta
    assert router.e_score_correction_bias.dtype is torch.float32
    router.to_empty(device="cpu").half().reset_parameters()
    assert router.e_score_correction_bias.dtype is torch.float32
    assert not router.e_score_correction_bias.any()
    assert router.weight.dtype is torch.float16


def test_losses_that_checkpointing_dropped_are_named() -> None:
    """Reentrant checkpointing runs forward without a graph."""
    layer, x = switchgear.MoE(H, 12, E, 2, balance=[SwitchLoss()]), torch.randn(7, H, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint(layer, x, use_reentrant=False)
        assert switchgear.balance_loss(layer).requires_grad
    checkpoint(layer, x, use_reentrant=True)
    with pytest.warns(UserWarning, match="use_reentrant=False"):
        switchgear.balance_loss(layer)
    layer.gate.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        switchgear.balance_loss(layer)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_by_checkpointing_counts_nothing(use_reentrant: bool, at_once: bool) -> None:
    """Over three micro-batches, losses, gradients and counts are those of calls without checkpoints, with a backward
    after each or `at_once` after all."""
    balance = [SwitchLoss(scope="global", accumulate=True), *controlled().balance, partial(AdaptiveSparsity, 2)]
    plain = switchgear.Router(H, E, select=partial(RunningCap, TopK(2), math.inf), balance=balance)
    recomputed = copy.deepcopy(plain)
    batches = [torch.randn(7, H, requires_grad=True) for _ in range(3)]

    def loss_of(router: switchgear.Router, x: Tensor) -> Tensor:
        return torch.stack(list(router(x).losses.values())).sum()

    for part in [batches] if at_once else [[x] for x in batches]:
        wanted = torch.stack([loss_of(plain, x) for x in part])
        loss = torch.stack([checkpoint(loss_of, recomputed, x, use_reentrant=use_reentrant) for x in part])
        assert torch.equal(loss, wanted)
        wanted.sum().backward()
        loss.sum().backward()
    # three gradients that are added in another order, of which the largest element measures the size
    bound = 4 * torch.finfo(torch.float32).eps * float(plain.weight.grad.abs().max())
    torch.testing.assert_close(recomputed.weight.grad, plain.weight.grad, rtol=0, atol=bound)
    assert torch.equal(recomputed.tokens_per_expert, plain.tokens_per_expert)
    assert torch.equal(recomputed.select.totals, plain.select.totals)
    assert plain.tokens_per_expert.sum() == 3 * 7 * 2
    plain.after_step()
    recomputed.after_step()
    for name, value in plain.state_dict().items():
        assert torch.equal(recomputed.state_dict()[name], value), name


COUNTING = {
    "Switch": {"balance": [SwitchLoss]},
    "several": {"balance": [SwitchLoss, partial(AdaptiveSparsity, 2), LossFreeBias(0.1)]},
    "Skywork": {"balance": [partial(SwitchLoss, AdaptiveCoefficient)], "capacity": Capacity(1.0)},
    "quantile": {"score_function": "sigmoid", "balance": [QuantileBias, SwitchLoss]},
    "RunningThreshold": {
        "top_k": None,
        "select": Broadcast(TopK(2), partial(RunningThreshold, 0.5), 1.0),
        "balance": [SwitchLoss],
    },
    "over a step": {"balance": [partial(SwitchLoss, scope="global", accumulate=True)]},
    "RunningCap": {"top_k": None, "select": partial(RunningCap, TopK(2), math.inf), "balance": [SwitchLoss]},
    "Monet": None,
}


@pytest.mark.parametrize("saved", ["", "aten.add.Tensor", "aten.mm"])
@pytest.mark.parametrize("name", COUNTING)
def test_selective_checkpointing_does_not_see_what_is_counted(name: str, saved: str) -> None:
    """Two layers under policies that save all ops (""), or those with a name, have the bits of layers without."""

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if saved in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    options = COUNTING[name]
    layers = [
        Monet(H, 6, 4, 2, top_k=2) if options is None else switchgear.MoE(H, 12, E, **{"top_k": 2, **options})
        for _ in range(2)
    ]
    plain = nn.Sequential(*layers)
    selective, x = copy.deepcopy(plain), torch.randn(2, 7, H)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    for model in (plain, selective):
        y = model(x) if model is plain else checkpoint(model, x, use_reentrant=False, context_fn=contexts)
        (y.square().mean() + switchgear.balance_loss(model)).backward()
        switchgear.after_step(model)
    for parameter, wanted in zip(selective.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.grad, wanted.grad)
    for buffer, wanted in zip(selective.buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, wanted)


def controlled() -> switchgear.Router:
    coefficient = partial(AdaptiveCoefficient, xi=0.01, beta=0.5)
    balance = [LossFreeBias(0.1, "proportional"), partial(SwitchLoss, coefficient)]
    return switchgear.Router(H, E, 2, capacity=Capacity(1.0, scope="sequence"), balance=balance)


def _bias_of(rank: int, port: int, x: Tensor, state: dict[str, Tensor], queue: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for context in (Context(group=dist.group.WORLD), NOTHING_KNOWN):
        queue.put(_stepped(x[rank], state, context))
    dist.barrier()
    dist.destroy_process_group()


def _stepped(x: Tensor, state: dict[str, Tensor], context: Context) -> tuple[list[float], float]:
    router = controlled()
    router.load_state_dict(state)
    wrapped = nn.parallel.DistributedDataParallel(router)
    for sequence in x:
        wrapped(sequence[None], context).topk_weights.sum().backward()
    router.after_step()
    return router.e_score_correction_bias.tolist(), float(router.balance[1].coefficient.value)


@pytest.mark.slow
def test_row4_loss_free_balancing_and_skywork_count_over_processes() -> None:
    """Two processes with two sequences each, one per call, update bias and coefficient like one process with all four:
    under DistributedDataParallel, which overwrites buffers at each call, with a group and without one."""
    whole = controlled()
    state, x = copy.deepcopy(whole.state_dict()), torch.randn(2, 2, 30, H)
    assert whole(x.flatten(0, 1)).num_dropped > 0
    whole.after_step()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_bias_of, args=(rank, port, x, state, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    found = [queue.get() for _ in range(4)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for bias, coefficient in found:
        torch.testing.assert_close(torch.tensor(bias), whole.e_score_correction_bias)
        assert coefficient == pytest.approx(float(whole.balance[1].coefficient.value))


def test_a_router_is_copied_and_saved_without_its_process_group() -> None:
    router = controlled()
    router(torch.randn(1, 7, H), Context(group=threading.Lock()))  # like a group, it is no object to copy
    saved = io.BytesIO()
    torch.save(router, saved)
    saved.seek(0)
    for copied in (copy.deepcopy(router), torch.load(saved, weights_only=False)):
        assert torch.equal(copied.tokens_per_expert, router.tokens_per_expert)


def test_counts_follow_a_router_that_is_moved() -> None:
    router, x = switchgear.Router(H, E, 2, balance=[LossFreeBias(0.1)], device="meta"), torch.randn(7, H)
    router.to_empty(device="cpu").reset_parameters()
    counts = count_tokens(router(x).topk_ids, E)
    assert torch.equal(router.double().tokens_per_expert, counts)
    router.tokens_per_expert = router.tokens_per_expert.to("meta")  # as after load_state_dict(assign=True)
    router.after_step()
    assert torch.equal(router.tokens_per_expert, torch.zeros(E, dtype=torch.int64))


# ---- global balance --------------------------------------------------------------------------------------------------


def test_row5_demons_in_the_detail_counts_over_the_micro_batches_of_a_step(backend: str) -> None:
    layer = layer_of(presets.global_balance(balance=0.1))
    first, second = torch.randn(20, H), torch.randn(12, H)
    layer(first)

    def loop(layer: Any, x: Tensor) -> Any:
        def p_of(x: Tensor) -> Tensor:
            return (x @ layer.gate.weight.T).softmax(-1)

        p = p_of(x)
        ids, weights = chosen(p, 2)
        seen = ids + chosen(p_of(first.double()), 2)[0]
        loss = sum(sum(e in choice for choice in seen) / 32 * p[:, e].mean() for e in range(E))
        return mixture(layer.experts, x, ids, weights), 0.1 * E * loss

    before = layer.gate.balance[0]._counts.clone()
    layer.gate.balance[0].register_forward_pre_hook(partial(_restore, before))  # each forward is the second one
    assert_agrees(layer, loop, second)
    switchgear.after_step(layer)
    assert layer.gate.balance[0]._counts is None  # a new step starts without the old counts


def _restore(counts: Tensor, module: Any, args: Any) -> None:
    module._counts = counts.clone()


# ---- clusters of experts ---------------------------------------------------------------------------------------------


def test_row20_moec_is_a_loop_over_what_its_clusters_leave_open(backend: str) -> None:
    options = presets.moec(num_clusters=2, clusters=20.0, dropout=0.5, balance=0.1)
    layer = layer_of(options, capacity=None)
    closed = layer.gate.select.mask.closed.clone()
    assert closed.view(2, 4).sum(1).tolist() == [2] * 2

    def loop(layer: Any, x: Tensor) -> Any:
        score = layer.gate.score
        rows = []
        for row in x:
            low = score.projection @ row
            rows.append(torch.stack([low @ e / (low.norm() * e.norm()) for e in score.embeddings]))
        p = (torch.stack(rows) / score.log_tau.exp()).masked_fill(closed, -math.inf).softmax(-1)
        ids, weights = chosen(p, 1)
        clusters = [[e for e in (c, c + 1, c + 2, c + 3) if not closed[e]] for c in (0, 4)]
        variances = [torch.stack([p[:, e].sum() / len(x) for e in cluster]).var() for cluster in clusters]
        return mixture(layer.experts, x, ids, weights), 0.1 * switch_loss(p, ids) + 20 * E * sum(variances) / 2

    assert_agrees(layer, loop, torch.randn(20, H))


@pytest.mark.parametrize("dropout", [0.0, 0.5, 0.75])
def test_row20_moec_asks_nothing_of_a_perfectly_clustered_router(dropout: float) -> None:
    """Closed experts have probability 0. Were they counted, their zeros would be variance inside clusters."""
    select = partial(Masked, TopK(1), partial(ClusterDropout, 2, dropout))
    router = switchgear.Router(H, E, select=select, balance=[partial(ClusterVariance, 2, 1.0)])
    logits = torch.randn(20, 2).repeat_interleave(4, 1)  # equal inside each cluster
    loss = router.decide(logits, Context(training=True)).losses["clusters"]
    assert abs(float(loss)) < 1e-6


@pytest.mark.parametrize(("size", "rate", "stay"), [(5, 0.5, 2), (8, 0.75, 2), (10, 0.9, 1), (3, 0.9, 1), (7, 0.0, 7)])
def test_row20_moec_keeps_the_whole_part_of_a_cluster_open(size: int, rate: float, stay: int) -> None:
    mask = ClusterDropout(2, rate, num_experts=2 * size)
    assert (~mask.closed).view(2, size).sum(1).tolist() == [stay] * 2


def test_row20_moec_closes_the_same_experts_for_an_interval() -> None:
    layer = presets.build(H, I, 24, **presets.moec(num_clusters=3, dropout=0.25, interval=4), return_routing=True)
    mask, seen = layer.gate.select.mask, []
    for _ in range(12):
        ids = layer(torch.randn(200, H))[1].topk_ids
        closed = mask.closed.nonzero().flatten()
        assert not torch.isin(ids, closed).any()
        assert mask.closed.view(3, 8).sum(1).tolist() == [2, 2, 2]  # 6 stay
        seen.append(tuple(closed.tolist()))
        switchgear.after_step(layer)
    assert [seen[k] == seen[k + 1] for k in range(11)] == [(k + 1) % 4 != 0 for k in range(11)]
    again = presets.build(H, I, 24, **presets.moec(num_clusters=3))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.gate.select.mask.closed, mask.closed)
    ids = layer.eval()(torch.randn(2000, H))[1].topk_ids
    assert torch.isin(mask.closed.nonzero().flatten(), ids).any()  # all are open in evaluation
    for name, wrong in {"rate": {"rate": 1.0}, "interval": {"interval": 0}, "groups": {"num_experts": None}}.items():
        with raises(ValueError, name):
            ClusterDropout(**{"groups": 3, "num_experts": 24, **wrong})


# ---- token gradient conflict -----------------------------------------------------------------------------------------


def test_row21_gradient_conflict_is_a_loop_over_token_gradients(backend: str) -> None:
    layer, x = layer_of(presets.gradient_conflict()), torch.randn(20, H)
    target = torch.randn(20, H)
    y, routing = layer(x)
    loss = (y - target).square().sum()
    found = GradientConflict(0.1)(loss, y, routing)
    grad_y = 2 * (y - target).detach().double()
    p = (x.double() @ layer.gate.weight.detach().double().T).softmax(-1)
    terms = []
    for e in range(E):
        mine = [(t, k) for t in range(20) for k in range(2) if routing.topk_ids[t, k] == e]
        if mine:
            mean = torch.stack([p[t, e] * grad_y[t] for t, _ in mine]).mean(0)
        for t, k in mine:
            cosine = torch.cosine_similarity(grad_y[t], mean, dim=0)
            assert bool(found.conflicts[t, k]) == bool(cosine < 0.1)
            if cosine < 0.1:
                z = x[t].double() @ layer.gate.weight.double().T
                terms.append(-(-z).log_softmax(-1)[e])
    wanted = torch.stack(terms).mean()
    torch.testing.assert_close(found.loss.double(), wanted, rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(found.loss, layer.gate.weight, retain_graph=True)
    (grad64,) = torch.autograd.grad(wanted, layer.gate.weight)
    torch.testing.assert_close(grad, grad64, rtol=1e-4, atol=1e-6)


# ---- DeepSeekMoE -----------------------------------------------------------------------------------------------------


def test_row3_deepseek_moe_is_a_loop_with_shared_experts(backend: str) -> None:
    layer = layer_of(presets.deepseek_moe(top_k=3, balance=0.1, num_devices=4, device_balance=0.2))

    def loop(layer: Any, x: Tensor) -> Any:
        p = (x @ layer.gate.weight.T).softmax(-1)
        ids, weights = chosen(p, 3)
        f = [E / (3 * len(x)) * sum(e in choice for choice in ids) for e in range(E)]
        experts = sum(f[e] * p[:, e].mean() for e in range(E))
        devices = sum((f[e] + f[e + 1]) / 2 * (p[:, e].mean() + p[:, e + 1].mean()) for e in range(0, E, 2))
        shared = feed_forward(layer.shared_experts, x)
        return mixture(layer.experts, x, ids, weights) + shared, 0.1 * experts + 0.2 * devices

    assert_agrees(layer, loop, torch.randn(20, H))
    assert layer.shared_experts.up_proj.weight.shape == (2 * I, H)


def test_row3_deepseek_moe_has_the_constants_of_the_16b_model() -> None:
    layer = presets.build(H, I, 64, **presets.deepseek_moe())
    (loss,) = layer.gate.balance
    assert (layer.gate.select.top_k, layer.shared_experts.down_proj.in_features, loss.coefficient) == (6, 2 * I, 0.001)


def test_row3_deepseek_moe_has_no_device_loss_without_devices() -> None:
    with raises(ValueError, "num_devices"):
        presets.deepseek_moe(device_balance=5.0)


def test_row3_deepseek_moe_without_routed_weight_is_its_shared_experts() -> None:
    layer, x = layer_of(presets.deepseek_moe(top_k=3)).eval(), torch.randn(9, H)
    layer.gate.select = lambda z, context, bias=None: TopK(3, scale=0.0)(z, context, bias)
    assert torch.equal(layer(x), layer.shared_experts(x))


def test_row3_deepseek_moe_slices_of_a_network_are_the_network() -> None:
    """m experts with 1/m of the width, all chosen with weight 1."""
    whole, slices = switchgear.layers.SharedExperts(H, 24), switchgear.Experts(H, 6, 4)
    with torch.no_grad():
        gate, up = (p.weight.view(4, 6, H) for p in (whole.gate_proj, whole.up_proj))
        slices.gate_up_proj.copy_(torch.cat((gate, up), 1))
        slices.down_proj.copy_(whole.down_proj.weight.view(H, 4, 6).transpose(0, 1))
    x, ids = torch.randn(5, H), torch.arange(4, dtype=torch.int32).expand(5, 4)
    torch.testing.assert_close(slices(x, ids, torch.ones(5, 4)), whole(x))


# ---- null experts ----------------------------------------------------------------------------------------------------


def test_row8_adamoe_is_a_loop_with_null_experts(backend: str) -> None:
    layer = layer_of(presets.adamoe(top_k=4, null_experts=6, balance=0.1))

    def loop(layer: Any, x: Tensor) -> Any:
        p = (x @ layer.gate.weight.T).softmax(-1)
        ids, weights = chosen(p, 4)
        true = [[e if e < E else -1 for e in choice] for choice in ids]
        sums = [
            sum(w for w, e in zip(ws, choice, strict=True) if e >= 0) for ws, choice in zip(weights, true, strict=True)
        ]
        scaled = [ws / s if torch.is_tensor(s) else ws for ws, s in zip(weights, sums, strict=True)]
        load = [sum(e in choice for choice in ids) / len(x) for e in range(E + 6)]
        load[E:] = [sum(load[E:]) / 6] * 6
        loss = (E + 6) * sum(load[e] * p[:, e].mean() for e in range(E + 6))
        return mixture(layer.experts.experts, x, true, scaled), 0.1 * loss

    assert_agrees(layer, loop, torch.randn(30, H))


def test_row8_adamoe_tokens_of_null_experts_alone_are_zeros_and_plans_hold_true_pairs() -> None:
    layer = layer_of(presets.adamoe(top_k=2, null_experts=6), return_routing=True)
    x = torch.randn(200, H)
    y, routing = layer(x)
    true = routing.topk_ids < E
    none = ~true.any(1)
    assert none.any()
    assert not y[none].any()
    plan = switchgear.plan(routing.topk_ids.masked_fill(~true, -1), E)
    assert plan.expert_offsets[-1] == true.sum()
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert NullAwareSwitchLoss(num_null=6).coefficient == 1e-4


# ---- heterogeneous experts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [None, 0.6])
@pytest.mark.parametrize(("widths", "mean"), [("arithmetic", 32), ("geometric", 255), ("hybrid", 8)])
def test_row9_hmoe_is_a_loop_of_widths_with_a_penalty(widths: str, mean: int, top_p: float | None) -> None:
    """Equations 7 to 11 of the appendix, and 4 and 5: with top-p alone, the entropy of the router too."""
    layer = presets.build(H, mean, 8, **presets.hmoe(widths=widths, top_p=top_p))
    sizes = list(layer.experts.intermediate_sizes)
    assert isinstance(layer.experts, HeterogeneousExperts)
    assert sum(sizes) == 8 * mean

    def choice_of(row: Tensor) -> list[int]:
        order = best(row, 8)
        if top_p is None:
            return order[:2]
        return order[: next(t for t in range(1, 9) if sum(row[e] for e in order[:t]) >= top_p)]

    def loop(layer: Any, x: Tensor) -> Any:
        p = (x @ layer.gate.weight.T).softmax(-1)
        ids = [choice_of(row) for row in p]
        rows = []
        for row, choice, q in zip(x, ids, p, strict=True):
            y = torch.zeros_like(row)
            for e in choice:
                gate_up, down = layer.experts.weights_of(e)
                gate, up = (gate_up @ row).chunk(2)
                y = y + q[e] / sum(q[i] for i in choice) * (down @ (F.silu(gate) * up))
            rows.append(y)
        load = [sum(e in choice for choice in ids) / len(x) * sizes[e] / mean for e in range(8)]
        loss = 0.1 * 8 * sum(load[e] * p[:, e].mean() for e in range(8))
        if top_p is not None:
            loss = loss + 0.03 * 8 * -sum(q * q.log() for row in p for q in row) / len(x)
        return torch.stack(rows), loss

    assert_agrees(layer, loop, torch.randn(12, H), length=2 * max(sizes) + 64)


def test_row9_hmoe_has_no_entropy_loss_without_top_p() -> None:
    with raises(ValueError, "top_p"):
        presets.hmoe(entropy=0.1)


# ---- a deep mixture --------------------------------------------------------------------------------------------------


def test_row26_deep_mixture_is_two_dense_layers(backend: str) -> None:
    layer = presets.build(H, I, 3, **presets.deep_mixture())

    def loop(layer: Any, x: Tensor) -> Tensor:
        for moe in layer:
            p = (x @ moe.gate.weight.T).softmax(-1)
            x = sum(p[:, e : e + 1] * expert(moe.experts, e, x) for e in range(3))
        return x

    assert_agrees(layer, loop, torch.randn(15, H))


class Only(nn.Module):
    """Sends every token to one expert."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, router_logits: Tensor, context: Context, bias: Tensor | None = None) -> Routing:
        ids = torch.full((len(router_logits), 1), self.number, dtype=torch.int32)
        return Routing(ids, torch.ones(len(ids), 1), router_logits, router_logits.shape[1])


def test_row26_deep_mixture_uses_pairs_of_experts() -> None:
    """E1 · E2 combinations: each pair of chosen experts is a different function."""
    layer = presets.build(H, I, 3, **presets.deep_mixture()).eval()
    x, outputs = torch.randn(1, H), []
    for i in range(3):
        for j in range(3):
            layer[0].gate.select, layer[1].gate.select = Only(i), Only(j)
            outputs.append(layer(x))
    assert len({tuple(y.flatten().tolist()) for y in outputs}) == 9


def test_row26_deep_mixture_closes_experts_that_are_ahead() -> None:
    select = RunningCap(Dense(), margin=5.0, num_experts=4)
    select.totals.copy_(torch.tensor([20.0, 2.0, 1.0, 1.0]))  # mean 6: the first is ahead by 14
    logits = torch.randn(10, 4)
    routing = select(logits, Context(training=True))
    assert not routing.topk_weights[:, 0].any()
    torch.testing.assert_close(routing.topk_weights.sum(1), torch.ones(10))
    torch.testing.assert_close(select.totals, torch.tensor([19.0, 1, 0, 0]) + routing.topk_weights.sum(0))
    torch.testing.assert_close(select(logits, NOTHING_KNOWN).topk_weights, logits.softmax(-1))
    for _ in range(200):  # in the end no total is ahead by more than the margin and one call
        select(logits, Context(training=True))
    assert select.totals.max() - select.totals.mean() < 5 + 10 + 14
    with raises(ValueError):
        RunningCap(Dense(), -1.0, 4)


def test_row26_deep_mixture_keeps_counting_after_many_tokens() -> None:
    select = RunningCap(Dense(), margin=5.0, num_experts=4)
    select.totals.fill_(2.0**30)  # as an earlier version would have saved it; the next float32 is 128 away
    logits = torch.tensor([10.0, 0, 0, 0]).expand(9, 4)
    select(logits, Context(training=True))
    assert select(logits, Context(training=True)).topk_weights[:, 0].eq(0).all()
    assert select.totals.max() < 20


def test_row26_deep_mixture_closes_experts_under_a_bias_too() -> None:
    select = RunningCap(TopK(2, "sigmoid"), margin=5.0, num_experts=4)
    select.totals.copy_(torch.tensor([20.0, 2.0, 1.0, 1.0]))
    bias = torch.tensor([2.0, 0.0, 0.0, 0.0])
    assert not (select(torch.randn(24, 4), Context(training=True), bias).topk_ids == 0).any()
    assert (select(torch.randn(24, 4), NOTHING_KNOWN, bias).topk_ids[:, 0] == 0).all()


# ---- compositions from their presets ---------------------------------------------------------------------------------


def test_compositions_of_presets_are_their_loops(backend: str) -> None:
    """test_papers_layers.py tests the layers themselves, one by one."""

    def mixed(moe: Any, x: Tensor) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        p = (rows @ moe.gate.weight.T).softmax(-1)
        ids, weights = chosen(p, 2)
        y = mixture(moe.experts, rows, ids, weights)
        if moe.shared_experts is not None:
            y = y + feed_forward(moe.shared_experts, rows)
        return y.view(x.shape), 0.1 * switch_loss(p, ids)

    def cartesian(layer: Any, x: Tensor) -> Any:
        first, loss = mixed(layer.first, x)
        second, more = mixed(layer.second, F.layer_norm(x + first, (H,), layer.norm.weight, layer.norm.bias))
        return second, loss + more

    def multi_head(layer: Any, x: Tensor) -> Any:
        pieces = (x @ layer.head_proj.weight.T).view(-1, 4)
        y, loss = mixed(layer.moe, pieces)
        return y.view(x.shape) @ layer.merge_proj.weight.T, loss

    assert_agrees(layer_of(presets.cartesian(balance=0.1)), cartesian, torch.randn(9, H))
    assert_agrees(layer_of(presets.multi_head(heads=4, balance=0.1)), multi_head, torch.randn(9, H))


def test_a_balance_of_a_function_and_of_objects_adds_up() -> None:
    def constant(routing: Any, context: Any) -> Tensor:
        return torch.tensor(2.0)

    moe = switchgear.MoE(H, I, E, 2, balance=[constant, constant, partial(SwitchLoss, 0.5)])
    moe(torch.randn(5, H))
    assert set(moe.losses) == {"constant", "switch"}
    assert moe.losses["constant"] == 4
    torch.testing.assert_close(switchgear.balance_loss(nn.Sequential(moe, moe)), 4 + moe.losses["switch"])
    moe.eval()(torch.randn(5, H))
    assert moe.losses == {}


def test_masks_given_as_partials_know_the_number_of_experts() -> None:
    moe = switchgear.MoE(H, I, E, select=partial(Masked, TopK(2), partial(ClusterDropout, 2, 0.5)))
    assert moe.gate.select.mask.closed.view(2, 4).sum(1).tolist() == [2, 2]


# ---- calls that fail -------------------------------------------------------------------------------------------------


def test_a_loss_that_raises_leaves_no_counts() -> None:
    router = switchgear.Router(H, E, 2, balance=[LossFreeBias(), SwitchLoss(1.0, "sequence")])
    with raises(ValueError, "sequence_length"):
        router(torch.randn(7, H))
    assert not router.tokens_per_expert.any()
