# SPDX-License-Identifier: BSD-3-Clause
"""What users do with an offloaded model: it works with the resident model's bits, or the message says what to call."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch
from memory_store import MemoryStore
from offload_cases import check, make_model, outputs_of, same_bits, steps_of
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import switchgear
from errors import raises
from switchgear import MoE, offload, routing
from switchgear.adapters import add_lora
from switchgear.integrations.transformers import accelerate
from switchgear.offload import Belady, NextGate
from switchgear.offload.residency import group_layers, plan_caches
from switchgear.trace import RoutingTrace
from switchgear.weights import stored_of
from tiny_models import build

in_both_memories = pytest.mark.usefixtures("memory")
FORMS = ("plain", "panels", "compact", "int8", "int4", "fp8", "mxfp4", "nf4", "groups")


@in_both_memories
@pytest.mark.parametrize("form", FORMS)
def test_the_bits_of_the_resident_model(form: str, isa: str) -> None:
    size = 512 if form in ("panels", "compact") else 32  # whole panels; rows that are smaller than plain ones
    model, steps = make_model(size=size), steps_of(count=8, size=size)
    if form != "plain":
        switchgear.store(model, form)
    wanted = outputs_of(model, steps)
    cache = offload.offload(model, MemoryStore(model), slots=3)
    assert all(map(same_bits, outputs_of(model, steps), wanted))
    assert cache.statistics.misses > 0
    check(cache)
    cache.close()
    assert all(map(same_bits, outputs_of(model, steps), wanted))


@in_both_memories
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "olmoe"])
def test_generate(model_type: str) -> None:
    """Of Hugging Face models, also with experts on meta."""
    model: Any = build(model_type).eval()
    accelerate(model)
    prompt = torch.arange(1, 9)[None]
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), routing.record(model) as wanted_choices:
        wanted = model.generate(prompt, **options)
    store = MemoryStore(model)
    for name in store.layers:
        experts = model.get_submodule(name)
        for key in ("gate_up_proj", "down_proj"):
            parameter = getattr(experts, key)
            setattr(experts, key, nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad))
    with offload.offload(model, store, slots=2) as cache:
        with torch.no_grad(), routing.record(model) as choices, RoutingTrace(model) as trace:
            got = model.generate(prompt, **options)
        assert torch.equal(got.sequences, wanted.sequences)
        assert all(map(same_bits, got.logits, wanted.logits))
        for name, layer in choices.layers.items():
            assert torch.equal(layer.topk_ids(), wanted_choices.layers[name].topk_ids())
        assert trace.summary()
        assert cache.statistics.misses > 0
        check(cache)
    with raises(RuntimeError):
        model(prompt)
    with offload.offload(model, store, slots=2):
        assert torch.equal(model.generate(prompt, **options).sequences, wanted.sequences)


@in_both_memories
def test_overrides() -> None:
    model, steps = make_model(), steps_of()
    with routing.override(model, disable=[0, 1]):
        wanted = outputs_of(model, steps)
        offload.offload(model, MemoryStore(model), slots=2)
        assert all(map(same_bits, outputs_of(model, steps), wanted))


@in_both_memories
def test_all_in_memory_is_the_stored_model() -> None:
    """No Python runs beside that of stored weights; gradients and state of the cache are none of its business."""
    model, steps = make_model(), steps_of()
    wanted = outputs_of(model, steps)
    for options in ({"slots": 6}, {"slots": 99}, {"bytes": 1 << 30}, {"slots": 6, "shared": True}):
        store = MemoryStore(model)
        cache = offload.offload(model, store, **options)
        assert cache.is_inert
        assert type(stored_of(model[0].experts).weights(model[0].experts)[0]) is switchgear.Weight  # type: ignore
        begun = len(store.reader.begun)
        assert begun == 12
        assert all(map(same_bits, outputs_of(model, steps), wanted))
        assert len(store.reader.begun) == begun
        assert cache.statistics.misses == 0
        assert "in memory" in str(cache)
        cache.close()
        assert all(map(same_bits, outputs_of(model, steps), wanted))


def test_bytes_bound_the_memory() -> None:
    model, steps = make_model(), steps_of()
    wanted = outputs_of(model, steps)
    store = MemoryStore(model)
    record = store.layers["0.experts"].record_bytes
    for rows in range(4, 14):
        for shared in (False, True):
            with offload.offload(model, store, bytes=rows * record + 7, shared=shared) as cache:
                assert 0 < cache.nbytes <= rows * record + 7
                assert all(map(same_bits, outputs_of(model, steps), wanted))
                assert cache.is_inert == (rows >= 12)
    with raises(ValueError, "bytes"):
        offload.offload(model, store, bytes=100)


def test_all_experts_are_in_memory_where_their_bytes_are() -> None:
    """Nearly all would take more: with them go rows for large steps and for guesses."""
    for num_layers, shared, guess_rows in itertools.product((1, 2, 5), (False, True), (0, 16)):
        groups = group_layers([64] * num_layers, [6] * num_layers)
        (plan,) = plan_caches(groups, None, 6 * num_layers * 64, shared, guess_rows)
        assert (plan.fits, plan.rows) == (True, 6 * num_layers)
    with raises(ValueError, "bytes"):
        plan_caches(group_layers([64], [6]), None, 383, False, 16)


# ---- other users of the weights --------------------------------------------------------------------------------------


@in_both_memories
def test_adapters_in_waves() -> None:
    model, steps = make_model(), steps_of()
    add_lora(model, rank=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    wanted = outputs_of(model, steps)
    cache = offload.offload(model, MemoryStore(model), slots=1)
    assert all(map(same_bits, outputs_of(model, steps), wanted))
    cache.close()
    assert all(map(same_bits, outputs_of(model, steps), wanted))


@in_both_memories
def test_gradients_of_x_and_adapters() -> None:
    """Equal those of the stored model, even if experts of other layers replace these in the slots before backward."""
    model = make_model()
    switchgear.store(model, "int8")
    add_lora(model, rank=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    x = steps_of(count=2)[1]

    def gradients() -> list[Tensor]:
        model.zero_grad()
        inputs = x.clone().requires_grad_()
        model(inputs).float().square().sum().backward()
        assert inputs.grad is not None
        return [inputs.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    wanted = gradients()
    assert len(wanted) > 4
    cache = offload.offload(model, MemoryStore(model), slots=1, shared=True)
    got = gradients()
    assert len(got) == len(wanted)
    assert all(map(same_bits, got, wanted))
    check(cache)


@pytest.mark.parametrize("slots", [3, 6])
def test_closed_under_inference_mode_it_trains(slots: int) -> None:
    model, x = make_model(dtype=torch.float32), torch.randn(3, 32, requires_grad=True)
    with torch.inference_mode(), offload.offload(model, MemoryStore(model), slots=slots):
        model(x.detach())
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_adapters_of_an_inert_cache_made_under_inference_mode_train() -> None:
    model, x = make_model(dtype=torch.float32), torch.randn(3, 32, requires_grad=True)
    with torch.inference_mode():
        offload.offload(model, MemoryStore(model), slots=6)
    add_lora(model, rank=2)
    model(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("form", [None, "int8"])
def test_a_model_that_is_frozen_meanwhile_stays_frozen(form: str | None) -> None:
    """Also if its experts were stored before, so that `restore` decides. One layer that is frozen is not enough."""
    for frozen in (True, False):
        model = make_model()
        if form is not None:
            switchgear.store(model, form)
        with offload.offload(model, MemoryStore(model), slots=3):
            (model if frozen else model[0]).requires_grad_(False)
        switchgear.restore(model)
        assert [model[1].experts.down_proj.requires_grad, model[1].gate.weight.requires_grad] == [not frozen] * 2


def test_peft_freezes_a_model_that_is_offloaded() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model: Any = build("olmoe").eval()
    accelerate(model)
    with offload.offload(model, MemoryStore(model), slots=3):
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert all("lora" in name for name, parameter in wrapped.named_parameters() if parameter.requires_grad)


def test_torch_compile_runs_the_layer_itself() -> None:
    model, steps = make_model(), steps_of(count=4)
    wanted = outputs_of(model, steps)
    offload.offload(model, MemoryStore(model), slots=2)
    assert all(map(same_bits, outputs_of(torch.compile(model, backend="eager"), steps), wanted))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "traced",
    [
        lambda model, x: torch.jit.trace(model, (x,), check_trace=False),
        lambda model, x: make_fx(lambda given: model(given))(x),
        lambda model, x: make_fx(lambda given: model(given), pre_dispatch=True)(x),
        lambda model, x: torch.export.export(model, (x,), strict=False),
    ],
    ids=["jit", "make_fx", "pre_dispatch", "export"],
)
def test_a_graph_cannot_load_experts(traced: Any) -> None:
    model, steps = make_model(dtype=torch.float32), steps_of(torch.float32, count=2)
    wanted = outputs_of(model, steps)
    cache = offload.offload(model, MemoryStore(model), slots=3)
    with torch.no_grad(), raises(ValueError):
        traced(model, steps[0])
    assert all(map(same_bits, outputs_of(model, steps), wanted))
    check(cache)
    cache.close()
    with torch.no_grad(), offload.offload(model, MemoryStore(model), slots=6):
        torch.jit.trace(model, (steps[0],), check_trace=False)  # all experts are in memory


@in_both_memories
def test_autocast_and_other_dtypes() -> None:
    model, steps = make_model(dtype=torch.bfloat16), steps_of(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = outputs_of(model, steps)
        offload.offload(model, MemoryStore(model), slots=2)
        assert all(map(same_bits, outputs_of(model, steps), wanted))
    ids, weights = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
    with raises(TypeError, "x"):
        model[0].experts(torch.ones(1, 32), ids, weights)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("form", "dtype"),
    [(form, torch.float32) for form in ("plain", "panels", "compact", "int8")] + [("plain", torch.float16)],
)
def test_autocast_casts_the_experts_in_use(form: str, dtype: torch.dtype) -> None:
    """Also with adapters, and for gradients, whose experts are kept until the backward pass."""
    size = {"panels": 128, "compact": 256}.get(form, 32)
    model, steps = make_model(size=size, dtype=dtype), steps_of(count=4, size=size)
    model.requires_grad_(False)
    if form != "plain":
        switchgear.store(model, form)
    for factor in add_lora(model, 3):
        factor.data.normal_()
    steps += [torch.randn(0, size), torch.randn(1, size)]

    def gradients() -> list[Tensor]:
        found = []
        for x in steps[2:]:
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                y = model(leaf)
            y.square().sum().backward()
            found += [y.detach(), leaf.grad]
        return found

    with torch.autocast("cpu", torch.bfloat16):
        wanted = outputs_of(model, steps)
    wanted_gradients = gradients()
    with offload.offload(model, MemoryStore(model), slots=2) as cache:
        with torch.autocast("cpu", torch.bfloat16):
            assert all(map(same_bits, outputs_of(model, steps), wanted))
        assert cache.statistics.misses > 12
        check(cache)
    with offload.offload(model, MemoryStore(model), slots=5, shared=True):
        assert all(map(same_bits, gradients(), wanted_gradients))


@in_both_memories
def test_threads_take_turns() -> None:
    model, steps = make_model(), steps_of()
    wanted = outputs_of(model, steps)
    cache = offload.offload(model, MemoryStore(model), slots=2)
    failures: list[object] = []

    def run() -> None:
        for _ in range(5):
            if not all(map(same_bits, outputs_of(model, steps), wanted)):
                failures.append(1)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    check(cache)


# ---- what it refuses -------------------------------------------------------------------------------------------------


def test_state_dicts_copies_and_conversions_name_the_cache() -> None:
    model, steps = make_model(), steps_of()
    before = model.state_dict()
    wanted = outputs_of(model, steps)
    cache = offload.offload(model, MemoryStore(model), slots=2)
    state = model.state_dict()  # has shapes, and no numbers that anything could take for those of experts
    assert list(state) == list(before)
    assert all(state[name].shape == tensor.shape for name, tensor in before.items())
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items() if "_proj" not in name)
    experts = state["1.experts.down_proj"]
    for use in (
        lambda: torch.save(state, io.BytesIO()),
        lambda: pickle.dumps(state),
        lambda: copy.deepcopy(state),
        lambda: experts + 1,
        lambda: experts.float(),
        lambda: experts.numpy(),
        lambda: torch.zeros(6, 32, 32).copy_(experts),
    ):
        with raises((ValueError, RuntimeError)):
            use()
    with raises(RuntimeError):
        make_model().load_state_dict(state)
    message = "0.experts.gate_up_proj"
    with raises(ValueError, message):
        model.load_state_dict({name: tensor + 1 for name, tensor in before.items()})
    assert torch.equal(model.state_dict()["0.gate.weight"], before["0.gate.weight"])
    rest = {name: tensor for name, tensor in before.items() if "_proj" not in name}
    model.load_state_dict(rest)
    for copied in (copy.deepcopy, pickle.dumps):
        with raises(TypeError):
            copied(model)
    for change in (switchgear.restore, lambda m: switchgear.store(m, "int8")):
        with raises(ValueError):
            change(model)
    with raises(ValueError):
        offload.offload(model, MemoryStore(make_model()), slots=2)
    with raises(AttributeError):
        len(model[0].experts.gate_up_proj)  # type: ignore
    weight = stored_of(model[0].experts).weights(model[0].experts)[0]  # type: ignore
    with raises(ValueError):
        switchgear.grouped_gemm(steps[1][0], weight, torch.tensor([0] + [1] * 6, dtype=torch.int32))
    ids, weights = torch.tensor([[6]], dtype=torch.int32), torch.ones(1, 1)
    with raises(ValueError, "topk_ids"):
        model[0].experts(steps[1][0], ids, weights)  # type: ignore[operator]
    assert all(map(same_bits, outputs_of(model, steps), wanted))
    check(cache)
    cache.close()
    cache.close()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def other(name: str) -> MemoryStore:
    model = make_model()
    if name == "stored":
        switchgear.store(model, "int8")
    return MemoryStore(model)


@pytest.mark.parametrize(
    ("store", "options", "error", "message"),
    [
        (lambda: MemoryStore(make_model(3)), {}, ValueError, "model"),
        (lambda: MemoryStore(make_model(1)), {}, ValueError, "model.1.experts"),
        (
            lambda: MemoryStore(make_model(num_experts=4)),
            {},
            ValueError,
            "model.0.experts.gate_up_proj",
        ),
        (lambda: MemoryStore(make_model(dtype=torch.float16)), {}, ValueError, "model.0.experts.gate_up_proj"),
        (lambda: MemoryStore(make_model()), {"slots": 0}, ValueError, "slots"),
        (lambda: MemoryStore(make_model()), {"slots": 2.0}, TypeError, "slots"),
        (lambda: MemoryStore(make_model()), {"slots": None}, ValueError, "slots"),
        (lambda: MemoryStore(make_model()), {"bytes": 9}, ValueError, "slots"),
        (
            lambda: MemoryStore(make_model()),
            {"policy": Belady()},
            ValueError,
            "policy",
        ),
        (
            lambda: MemoryStore(make_model()),
            {"policy": Belady},
            TypeError,
            "policy",
        ),
        (lambda: MemoryStore(make_model()), {"timeout": 0}, ValueError, "timeout"),
        (lambda: MemoryStore(make_model()), {"prefetch_slots": 0}, ValueError, "prefetch_slots"),
        *(
            (lambda: MemoryStore(make_model()), {name: value}, error, message)
            for name, value, error, message in (
                ("slots", True, TypeError, "slots"),
                ("timeout", "5", TypeError, "timeout"),
                ("timeout", float("inf"), ValueError, "timeout"),
                ("threads", 1.5, TypeError, "threads"),
                ("threads", 0, ValueError, "threads"),
                ("device", "foo", ValueError, "device"),
                ("prefetch", NextGate, TypeError, "prefetch"),
                ("prefetch", "x", TypeError, "prefetch"),
            )
        ),
        (lambda: None, {}, TypeError, "store"),
    ],
)
def test_a_wrong_store_or_option_changes_nothing(store: Any, options: Any, error: Any, message: str) -> None:
    model, steps = make_model(), steps_of()
    wanted, before = outputs_of(model, steps), dict(model.named_parameters())
    with raises(error, message):
        offload.offload(model, store(), **{"slots": 2, **options})
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert all(map(same_bits, outputs_of(model, steps), wanted))


def test_counts_may_be_integers_of_numpy() -> None:
    model, steps = make_model(), steps_of()
    wanted = outputs_of(model, steps)
    for options in ({"slots": np.int64(2), "threads": np.int32(2)}, {"bytes": np.int64(1 << 20)}):
        with offload.offload(model, MemoryStore(model), **options) as cache:
            assert all(map(same_bits, outputs_of(model, steps), wanted))
            assert type(cache.slots) is int


def test_models_that_it_does_not_run() -> None:
    with raises(ValueError, "model"):
        offload.offload(nn.Linear(2, 2), MemoryStore(make_model()), slots=1)
    model: Any = build("mixtral")
    accelerate(model)
    store = MemoryStore(model)
    model.set_experts_implementation("eager")
    with raises(ValueError):
        offload.offload(model, store, slots=1)
    stored = make_model()
    switchgear.store(stored, "int4")
    with raises(ValueError):
        offload.offload(stored, MemoryStore(make_model()), slots=1)


def test_a_change_that_fails_halfway_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = make_model(), steps_of()
    wanted = outputs_of(model, steps)
    from switchgear.offload import attachment

    calls = []

    def put(*args: Any) -> None:
        calls.append(args)
        original(*args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    original = attachment.put
    monkeypatch.setattr(attachment, "put", put)
    store = MemoryStore(model)
    with pytest.raises(KeyboardInterrupt):
        offload.offload(model, store, slots=2)
    assert store.reader.closed
    assert all(map(same_bits, outputs_of(model, steps), wanted))
    assert len(model.state_dict()) == 6


def test_experts_that_are_all_ours_but_in_other_processes() -> None:
    model = make_model()
    model[0].experts.parallel = "ExpertParallel(2)"  # type: ignore[assignment]
    with raises(ValueError):
        offload.offload(model, MemoryStore(make_model()), slots=2)


def test_moe_without_tokens() -> None:
    model = make_model()
    cache = offload.offload(model, MemoryStore(model), slots=2)
    assert outputs_of(model, [torch.empty(1, 0, 32, dtype=torch.bfloat16)])[0].shape == (1, 0, 32)
    assert (cache.statistics.hits, cache.statistics.misses) == (0, 0)
    assert isinstance(model[0], MoE)
