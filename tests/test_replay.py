# SPDX-License-Identifier: BSD-3-Clause
"""Choices of one run are forced in another: bit-equal, through padding, packing, generation and checkpointing."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import switchgear
from errors import raises
from full_disk import full_disk
from switchgear import MoE
from switchgear.routing import (
    Capacity,
    ExpertChoice,
    GumbelSoftmax,
    Masked,
    PreRouter,
    RoutingRecord,
    RunningCap,
    SkipBelow,
    Temperature,
    TopK,
    TopP,
    decouple,
    override,
    record,
    replay,
)
from switchgear.trace import observe
from switchgear.trace.routing_record import LayerRecord

E, H, K = 8, 16, 2


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, H)
        self.layers = nn.ModuleList(MoE(H, 12, E, **{"top_k": K, **options}) for _ in range(2))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **context: Any,
    ) -> Tensor:
        x: Tensor = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x, **context)
        return x


def move(model: nn.Module) -> None:
    """As large a step as an optimizer never takes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3 * parameter.abs().mean())


def seen(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The choices and weights of a forward by layer."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad(), observe(model, lambda name, o: found.__setitem__(name, (o.topk_ids, o.topk_weights))):
        model(*args, **kwargs)
    return found


# ---- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [1, 2, 3, 8, 60, 64, 128, 256, 257])
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 5, 70_000])
def test_packing(num_classes: int, empty: bool, tokens: int) -> None:
    top_k = min(3, num_classes)
    ids = torch.randint(-1 if empty else 0, num_classes, (tokens, top_k))
    packed = LayerRecord.of(ids, num_classes)
    assert torch.equal(packed.topk_ids().long(), ids)
    states = num_classes + bool((ids < 0).any())
    assert packed.bits == max(1, math.ceil(math.log2(states)))
    assert len(packed.data) == math.ceil(tokens * top_k * packed.bits / 8)
    packed.check(tokens)


# ---- our layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": True, "scale": 2.5},
        {"score_function": "sigmoid", "normalize": True, "num_groups": 4, "topk_groups": 2, "selection_bias": True},
        {"top_k": None, "select": TopP(0.6)},
        {"top_k": None, "select": ExpertChoice(2.0)},
        {"jitter": 0.1},
    ],
    ids=["top_k", "normalized", "groups", "top_p", "expert_choice", "jitter"],
)
def test_choices_are_bit_equal_after_the_weights_moved(options: dict[str, Any]) -> None:
    model = Model(**options)
    ids = torch.randint(50, (3, 7))
    with record(model) as choices:
        model(ids)
        model(ids[:2])
    assert choices.lengths.tolist() == [7] * 5
    assert list(choices.layers) == ["layers.0.gate", "layers.1.gate"]
    model.eval()
    with record(model) as choices:
        model(ids)
    assert repr(choices) == f"RoutingRecord(2 layers, {len(ids)} sequences, {ids.numel()} tokens, with token ids)"
    want = seen(model, ids)
    with replay(model, choices):
        same = seen(model, ids)
    for name in want:
        assert torch.equal(want[name][0], same[name][0])
        assert torch.equal(want[name][1], same[name][1])  # weights too, while they have not moved
    move(model)
    moved = seen(model, ids)
    assert any(not torch.equal(moved[name][0], want[name][0]) for name in want)
    with replay(model, choices):
        got = seen(model, ids)
        again = seen(model, ids)  # the record begins anew
    for name in want:
        assert torch.equal(got[name][0], want[name][0])
        assert torch.equal(again[name][0], want[name][0])
        assert not torch.equal(got[name][1], want[name][1])
    assert all(torch.equal(a, b) for a, b in zip(seen(model, ids)["layers.0"], moved["layers.0"], strict=True))


def test_weights_and_gradients_are_those_of_the_current_logits() -> None:
    moe = MoE(H, 12, E, K, normalize=True, scale=1.5).double()
    x = torch.randn(1, 20, H, dtype=torch.float64)
    with record(moe) as choices:
        moe(x)
    ids = choices.layers["gate"].topk_ids().long()
    move(moe)
    want_weights = moe.gate.logits(x[0]).softmax(-1).gather(1, ids)
    want_weights = 1.5 * want_weights / want_weights.sum(-1, keepdim=True)
    want = moe.experts(x[0], ids.int(), want_weights)
    direction = torch.randn_like(want)
    (want * direction).sum().backward()
    wanted = moe.gate.weight.grad.clone()
    moe.zero_grad()
    with replay(moe, choices):
        got = moe(x)[0]
        (got * direction).sum().backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(moe.gate.weight.grad, wanted)
    assert wanted.abs().max() > 0


def test_packed_sequences_and_an_order() -> None:
    model = Model()
    parts = [torch.randint(50, (n,)) for n in (5, 3, 6)]
    packed = torch.cat(parts)[None]
    sequence_ids = torch.repeat_interleave(torch.tensor([9, 4, 7]), torch.tensor([5, 3, 6]))
    with record(model) as choices:
        model(packed, sequence_ids=sequence_ids)
    assert choices.lengths.tolist() == [5, 3, 6]
    want = choices.layers["layers.1.gate"].topk_ids()
    move(model)
    with replay(model, choices, sequences=[2, 0, 1]):
        third = seen(model, parts[2][None])["layers.1"][0]
        first = seen(model, parts[0][None])["layers.1"][0]
        second = seen(model, parts[1][None])["layers.1"][0]
    assert torch.equal(torch.cat([first, second, third]), want)


@pytest.mark.parametrize("name", ["sequence_ids", "position_ids"])
def test_no_tokens_are_no_sequences(name: str) -> None:
    model, none = Model(), torch.zeros(1, 0, dtype=torch.int64)
    with record(model) as choices:
        model(none, **{name: none})
    with replay(model, choices):
        model(none, **{name: none})
    assert choices.lengths.tolist() == []
    assert choices.layers["layers.1.gate"].num_tokens == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_repeats_the_choices(use_reentrant: bool) -> None:
    """Two forwards, then one backward: each layer's repetition finds the choices of its own forward."""
    model = Model()
    batches = [torch.randint(50, (2, 6)) for _ in range(2)]
    with record(model) as choices:
        for ids in batches:
            model(ids)
    move(model)

    def gradient() -> Tensor:
        model.zero_grad()
        with replay(model, choices):
            total = sum(model(ids).square().sum() for ids in batches)
            total.backward()  # type: ignore[union-attr]
        grad: Tensor = model.layers[0].gate.weight.grad
        return grad.clone()

    want = gradient()
    model.forward = lambda ids: checkpointed_forward(model, ids, use_reentrant)  # type: ignore[method-assign]
    torch.testing.assert_close(gradient(), want)
    assert want.abs().max() > 0


def checkpointed_forward(model: Model, ids: Tensor, use_reentrant: bool) -> Tensor:
    x: Tensor = model.embedding(ids)
    for layer in model.layers:
        x = x + checkpoint(layer, x, use_reentrant=use_reentrant)
    return x


def save_all(*args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


SELECTIVE = {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, save_all)}


@pytest.mark.parametrize("how", [{"use_reentrant": True}, {"use_reentrant": False}, SELECTIVE])
def test_checkpointing_of_the_whole_model_is_one_call(how: dict[str, Any]) -> None:
    model = nn.Sequential(MoE(H, 12, E, K), MoE(H, 12, E, K))
    batches = [torch.randn(2, 6, H, requires_grad=True) for _ in range(2)]
    with record(model) as choices:
        for x in batches:
            checkpoint(model, x, **how).sum().backward()
    assert choices.lengths.tolist() == [6] * 4
    move(model)
    with replay(model, choices):
        for i, x in enumerate(batches):
            want = choices.layers["1.gate"].topk_ids()[12 * i : 12 * (i + 1)]
            assert torch.equal(seen(model, x)["1"][0], want)
    with replay(model, choices):
        for i, x in enumerate(batches):
            want = choices.layers["1.gate"].topk_ids()[12 * i : 12 * (i + 1)]
            got: list[Tensor] = []
            with observe(model, lambda name, o: got.append(o.topk_ids), ["1"]):  # noqa: B023
                checkpoint(model, x, **how).sum().backward()
            assert torch.equal(got[0], want)


@contextmanager
def out_of_memory(module: nn.Module) -> Iterator[None]:
    """Inside the block, a call of the module raises."""

    def fail(*_: Any) -> None:
        raise MemoryError

    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        yield
    handle.remove()


def test_a_call_that_raises_is_not_replayed() -> None:
    model = nn.Sequential(MoE(H, 12, E, K), MoE(H, 12, E, K))
    batches = [torch.randn(2, 6, H) for _ in range(2)]
    with record(model) as choices:
        for x in batches:
            model(x)
    want = choices.layers["0.gate"].topk_ids().split(12)
    move(model)
    with replay(model, choices):
        for x, ids in zip(batches, want, strict=True):
            with out_of_memory(model[1].experts):
                model(x)
            with raises(ValueError):
                model(x.repeat(3, 1, 1))
            assert torch.equal(seen(model, x)["0"][0], ids)


def test_a_call_with_other_tokens_is_not_replayed() -> None:
    model, batches = Model(), [torch.full((2, 6), i) for i in range(2)]
    with record(model) as choices:
        for ids in batches:
            model(ids)
    with replay(model, choices):
        with raises(ValueError, "input_ids"):
            model(batches[1])
        for i, ids in enumerate(batches):
            want = choices.layers["layers.0.gate"].topk_ids()[12 * i : 12 * (i + 1)]
            assert torch.equal(seen(model, ids)["layers.0"][0], want)


def test_a_call_that_raises_is_not_recorded() -> None:
    model, ids = Model(), torch.randint(50, (2, 6))
    with record(model) as once:
        model(ids)
    with record(model) as retried:
        with out_of_memory(model.layers[1].experts):
            model(torch.randint(50, (3, 4)))
        model(ids)
        with out_of_memory(model.layers[0].experts):
            model(ids)
    assert torch.equal(retried.lengths, once.lengths)
    assert torch.equal(retried.token_ids, once.token_ids)
    for name, layer in once.layers.items():
        assert torch.equal(retried.layers[name].topk_ids(), layer.topk_ids())


def test_a_router_alone_is_recorded_and_replayed() -> None:
    router = switchgear.Router(H, E, K)
    x = torch.randn(2, 6, H)
    with record(router) as choices:
        want = router(x).topk_ids
    move(router)
    with replay(router, choices):
        assert torch.equal(router(x).topk_ids, want)


def test_a_record_of_other_choices(tmp_path: Path) -> None:
    model = Model()
    ids = torch.randint(E, (2, 12, K))
    ids[..., 1] = (ids[..., 0] + 1) % E
    tokens = torch.randint(50, (2, 6))
    choices = RoutingRecord.of({f"layers.{i}.gate": ids[i] for i in range(2)}, [6, 6], E, tokens)
    choices.save(tmp_path / "choices.pt")
    loaded = RoutingRecord.load(tmp_path / "choices.pt")
    assert loaded.num_bytes == choices.num_bytes == 2 * math.ceil(12 * K * 3 / 8)
    joined = RoutingRecord.join([loaded, choices])
    assert joined.num_sequences == 4
    with replay(model, joined):
        for _ in range(2):
            got = seen(model, tokens)
            assert all(torch.equal(got[f"layers.{i}"][0].long(), ids[i]) for i in range(2))


def test_other_choices_are_checked() -> None:
    ids = torch.tensor([[0, 1], [2, 3]])
    wrong: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        (({"a": ids + 1}, [2], 4), ValueError, "topk_ids"),
        (({"a": ids[0]}, [2], 4), ValueError, "topk_ids"),
        (({"a": ids.float()}, [2], 4), TypeError, "topk_ids"),
        (({"a": ids}, [3, -1], 4), ValueError, "lengths"),
        (({"a": ids}, [2], {"b": 4}), ValueError, "num_classes"),
        (({"a": ids * 0}, [2], 1), ValueError, "topk_ids"),
        (({"a": ids * 0 - 1}, [2], 0), ValueError, "num_classes"),
        (({"a": ids}, [0.7, 2.3], 4), TypeError, "lengths"),
        (({"a": ids // 2}, [2], 4), ValueError, "topk_ids"),
        (({"a": ids}, [2], 4, torch.tensor([0, 2**31])), ValueError, "token_ids"),
    ]
    for arguments, error, message in wrong:
        with raises(error, message):
            RoutingRecord.of(*arguments)
    assert not RoutingRecord.of({"a": ids[:0]}, [], 4).num_sequences
    empty = ids.clone().fill_(-1)  # is no expert, and may be there twice
    assert torch.equal(RoutingRecord.of({"a": empty}, [2], 4).layers["a"].topk_ids().long(), empty)


def test_a_failed_save_keeps_the_earlier_file(tmp_path: Path) -> None:
    with record(model := Model()) as choices:
        model(torch.randint(50, (2, 6)))
    path = tmp_path / "choices"
    choices.save(path)
    with full_disk(), raises(OSError):
        choices.save(path)
    assert RoutingRecord.load(path).num_sequences == 2
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_others(tmp_path: Path) -> None:
    with record(model := Model()) as choices:
        model(torch.randint(50, (2, 6)))
    choices.save(tmp_path / "good")
    good = torch.load(tmp_path / "good", weights_only=True)

    def spoiled(index: int, value: Any) -> dict[str, Any]:
        layers = {n: [value if i == index else v for i, v in enumerate(r)] for n, r in good["layers"].items()}
        return {**good, "layers": layers}

    states: list[Any] = [
        {}, [], 3, {**good, "format": 9}, {**good, "lengths": [3]}, {**good, "lengths": torch.tensor([7, 6])},
        {**good, "lengths": torch.tensor([-1, 13])}, {**good, "token_ids": torch.zeros(3, dtype=torch.int32)},
        spoiled(0, 5), spoiled(0, 1 << 40), spoiled(1, 3), spoiled(2, 4), spoiled(3, torch.zeros(9)), spoiled(4, 11),
    ]  # fmt: skip
    many = 10**9  # tokens, of which all have the same choice, in a file of 2 KB
    bits = torch.zeros(1, dtype=torch.uint8).expand(many // 4)
    huge = {"lengths": torch.tensor([many]), "token_ids": None, "layers": {"layer": [4, 1, 2, bits, many]}}
    for state in [*states, {**good, **huge}]:
        torch.save(state, tmp_path / "bad")
        with raises(ValueError, "path"):
            RoutingRecord.load(tmp_path / "bad")
    (tmp_path / "bad").write_bytes((tmp_path / "good").read_bytes()[:-100])
    with raises(ValueError, "path"):
        RoutingRecord.load(tmp_path / "bad")


def test_errors() -> None:
    model, ids = Model(), torch.randint(50, (2, 6))
    with record(model) as choices:
        model(ids)
    before = [list(layer.gate.overrides) for layer in model.layers]
    with raises(ValueError, "input_ids"), replay(model, choices):
        model((ids + 1) % 50)
    with raises(ValueError), replay(model, choices):
        model(torch.cat([ids, ids]))
    with raises(ValueError, "sequences"):
        replay(model, choices, sequences=[2]).__enter__()
    with raises(ValueError, "choices"):
        replay(MoE(H, 12, E, K), choices).__enter__()
    with raises(TypeError, "choices"):
        replay(model, {}).__enter__()  # type: ignore[arg-type]
    with raises(ValueError):
        record(Model(capacity=Capacity(1.0))).__enter__()
    with raises(ValueError):
        replay(Model(top_k=None, select=GumbelSoftmax()), choices).__enter__()
    small = nn.ModuleDict({"layers": nn.ModuleList(MoE(H, 12, 4, 1) for _ in range(2))})
    with raises(ValueError):
        replay(small, choices).__enter__()
    with raises(ValueError), record(model):
        model.layers[0](torch.randn(1, 3, H))
    assert [list(layer.gate.overrides) for layer in model.layers] == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_no_expert_is_forced_in_a_replay() -> None:
    model, ids = Model(), torch.randint(50, (2, 6))
    with record(model) as choices:
        model(ids)
    with replay(model, choices):
        for change in ({"force": [1]}, {"bias": {1: 2.0}}):
            message = next(iter(change))
            with raises(ValueError, message), override(model, **change):
                pass
            with raises(ValueError, message), model.layers[0].gate.intervene(**change):
                pass
        with override(model, disable=[1]):
            assert not any((got == 1).any() for got, _ in seen(model, ids).values())
        with override(model, select=TopK(K), force=[1]):
            assert all((got == 1).any(-1).all() for got, _ in seen(model, ids).values())


@pytest.mark.parametrize("how", ["replay", "decouple"])
def test_entering_changes_no_state(how: str) -> None:
    """The trial of a selection that counts what it chose."""
    model = Model(top_k=None, select=partial(RunningCap, TopK(K), 10.0))
    with record(model) as choices:
        model(torch.randint(50, (2, 6)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pre_router = PreRouter(H, [E, E])
    block = replay(model, choices) if how == "replay" else decouple(model, pre_router, model.embedding, K)
    with block:
        pass
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("select", "culprit"),
    [
        (partial(Masked, TopK(K), lambda logits, context: torch.arange(E) > 2), "Masked"),
        (partial(Temperature, TopK(K), 2.0), "Temperature"),
        (SkipBelow(TopK(K), 0.9), "SkipBelow"),
        (SkipBelow(GumbelSoftmax(), 0.0), "GumbelSoftmax"),
    ],
)
def test_a_refusal_names_the_selection_that_is_why(select: Any, culprit: str) -> None:
    model = Model(top_k=None, select=select)
    with record(model) as choices:
        model(torch.randint(50, (2, 6)))
    with raises(ValueError):
        replay(model, choices).__enter__()


def test_some_layers() -> None:
    model, ids = Model(), torch.randint(50, (2, 6))
    with record(model, layers=["layers.1.gate"]) as choices:
        model(ids)
    assert list(choices.layers) == ["layers.1.gate"]
    want = seen(model, ids)
    move(model)
    free = seen(model, ids)
    with replay(model, choices):
        got = seen(model, ids)
    assert torch.equal(got["layers.1"][0], want["layers.1"][0])
    assert torch.equal(got["layers.0"][0], free["layers.0"][0])


# ---- Hugging Face models ---------------------------------------------------------------------------------------------


@pytest.fixture
def mixtral() -> Any:
    tiny = pytest.importorskip("tiny_models", reason="transformers is not installed")
    importlib.import_module("switchgear.integrations.transformers")  # registers the experts "switchgear"
    return tiny.build("mixtral")


def test_no_expert_is_forced_in_a_replay_of_a_hugging_face_model(mixtral: Any) -> None:
    with record(mixtral) as choices:
        mixtral(torch.randint(3, 250, (1, 5)))
    message = "force"
    with replay(mixtral, choices), raises(ValueError, message), override(mixtral, force=[1]):
        pass


def tokens_of(record: RoutingRecord, sequence: int, layer: str) -> Tensor:
    start = int(record.lengths[:sequence].sum())
    return record.layers[layer].topk_ids()[start : start + int(record.lengths[sequence])]


def test_generation_is_replayed_in_training(mixtral: Any) -> None:
    """Rollout with left padding and a cache; the trainer pads right, packs, or takes one sequence at a time."""
    prompts = torch.randint(3, 250, (2, 6))
    mask = torch.ones_like(prompts)
    mask[0, :4] = 0
    with record(mixtral) as choices:
        out = mixtral.generate(prompts, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert choices.lengths.tolist() == [2 + 4, 6 + 4]  # the last token was never an input
    layer = "model.layers.3.mlp.experts"
    move(mixtral)
    full = [out[0, 4:], out[1]]
    length = max(map(len, full))
    right = torch.stack([torch.nn.functional.pad(ids, (0, length - len(ids))) for ids in full])
    right_mask = torch.stack([(torch.arange(length) < len(ids)).long() for ids in full])
    with replay(mixtral, choices):
        padded = seen(mixtral, input_ids=right, attention_mask=right_mask)["model.layers.3.mlp"][0].view(2, length, -1)
    packed = torch.cat(full)[None]
    positions = torch.cat([torch.arange(len(ids)) for ids in full])[None]
    with replay(mixtral, choices):
        one_row = seen(mixtral, input_ids=packed, position_ids=positions)["model.layers.3.mlp"][0]
    with replay(mixtral, choices, sequences=[1, 0]):
        singles = [seen(mixtral, input_ids=full[i][None])["model.layers.3.mlp"][0] for i in (1, 0)][::-1]
    at = 0
    for i, ids in enumerate(full):
        want = tokens_of(choices, i, layer).long()
        assert torch.equal(padded[i, : len(want)], want)
        assert torch.equal(one_row[at : at + len(want)], want)
        assert torch.equal(singles[i][: len(want)], want)
        at += len(ids)
    steps: list[Tensor] = []
    see = observe(mixtral, lambda name, o: steps.append(o.topk_ids), layers=["model.layers.3.mlp"])
    with replay(mixtral, choices), torch.no_grad(), see:  # with a cache, from left padding
        past = mixtral(input_ids=prompts, attention_mask=mask, use_cache=True).past_key_values
        for at in range(6, 10):
            longer = torch.nn.functional.pad(mask, (0, at - 5), value=1)
            mixtral(input_ids=out[:, at : at + 1], attention_mask=longer, past_key_values=past, use_cache=True)
    for i, first in enumerate((4, 0)):
        got = torch.cat([steps[0].view(2, 6, -1)[i, first:], *(step[i : i + 1] for step in steps[1:])])
        assert torch.equal(got, tokens_of(choices, i, layer).long())


@pytest.mark.parametrize("how", ["eager", "switchgear"])
def test_training_step_with_checkpointing(mixtral: Any, how: str) -> None:
    ids = torch.randint(3, 250, (2, 9))
    with record(mixtral) as choices, torch.no_grad():
        mixtral(input_ids=ids)
    move(mixtral)
    mixtral.config._experts_implementation = how
    mixtral.train()

    def gradient() -> Tensor:
        mixtral.zero_grad()
        with replay(mixtral, choices):
            mixtral(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grad: Tensor = mixtral.model.layers[1].mlp.gate.weight.grad
        return grad.clone()

    want = gradient()
    getattr(mixtral, "activation_checkpointing_enable", mixtral.gradient_checkpointing_enable)()
    got = gradient()
    assert want.abs().max() > 0
    torch.testing.assert_close(got, want)
    with replay(mixtral, choices):
        ids_seen = seen(mixtral, input_ids=ids)["model.layers.1.mlp"][0]
    assert torch.equal(ids_seen, choices.layers["model.layers.1.mlp.experts"].topk_ids().long())


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_without_a_mask_continues_sequences(mixtral: Any, name: str) -> None:
    """transformers renames the argument; older versions have only the second."""
    if name not in inspect.signature(mixtral.forward).parameters and name == "cache":
        pytest.skip("this transformers has no argument cache")
    ids = torch.randint(3, 250, (2, 9))
    with record(mixtral) as choices, torch.no_grad():
        output = mixtral(input_ids=ids[:, :5], use_cache=True)
        past = getattr(output, "cache", None) or output.past_key_values
        mixtral(input_ids=ids[:, 5:], use_cache=True, **{name: past})
    assert choices.lengths.tolist() == [9, 9]
    with replay(mixtral, choices):
        got = seen(mixtral, input_ids=ids)["model.layers.3.mlp"][0]
    assert torch.equal(got, choices.layers["model.layers.3.mlp.experts"].topk_ids().long())


STATIC = {"cache_implementation": "static", "disable_compile": True}


def test_a_static_cache_with_left_padding(mixtral: Any) -> None:
    """transformers passes masks [B,1,S,L] and [B,1,1,L], whose last columns are unfilled."""
    prompts, mask = torch.randint(3, 250, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with record(mixtral) as choices:
        out = mixtral.generate(prompts, **options, **STATIC)
    assert choices.lengths.tolist() == [2 + 4, 6 + 4]
    assert torch.equal(choices.token_ids.long(), torch.cat([out[0, 4:-1], out[1, :-1]]))
    with record(mixtral) as dynamic:
        mixtral.generate(prompts, **options)
    for name, layer in choices.layers.items():
        assert torch.equal(layer.topk_ids(), dynamic.layers[name].topk_ids())


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize(("model_type", "window"), [("qwen2_moe", None), ("mixtral", 4), ("mixtral", 8)])
def test_a_static_cache_of_other_masks(model_type: str, window: int | None, padding: int) -> None:
    """A dict of masks, None where only what is causal is masked; a window that the cache has filled."""
    build = pytest.importorskip("tiny_models", reason="transformers is not installed").build
    model, prompts, mask = build(model_type), torch.randint(3, 20, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :padding] = 0
    model.config.sliding_window = window
    with record(model) as choices:
        model.generate(prompts, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, **STATIC)
    assert choices.lengths.tolist() == [10 - padding, 10]


def test_names_leave_out_wrappers_of_blocks(mixtral: Any) -> None:
    ids = torch.randint(3, 250, (2, 9))
    with record(mixtral) as choices:
        mixtral(ids)
    mixtral.model.layers[1] = torch.compile(mixtral.model.layers[1], backend="eager")
    mixtral.model.layers[2] = checkpoint_wrapper(mixtral.model.layers[2])
    with record(mixtral) as wrapped, replay(mixtral, choices):
        mixtral(ids)
    assert list(wrapped.layers) == list(choices.layers)


def test_a_mask_that_does_not_tell_padding_is_refused() -> None:
    model, ids = Model(), torch.randint(50, (2, 5))
    with record(model) as choices:
        model(ids)
    message = "attention_mask"
    for mask in (torch.ones(2, 1, 3, 5), torch.ones(3, 1, 5, 5), torch.ones(2, 1, 1, 4)):
        with raises(ValueError, message), record(model):
            model(ids, mask)
        with raises(ValueError, message), replay(model, choices):
            model(ids, mask)


def test_rejected_drafts_are_left_out(mixtral: Any) -> None:
    """Of prompt lookup, within a generation and at its end; the prompt repeats itself, so drafts are found."""
    prompt = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    fed = []
    hook = mixtral.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True)
    for count in (3, 6):
        fed.clear()
        with record(mixtral) as choices:
            first, second = (
                mixtral.generate(prompt, max_new_tokens=count, do_sample=False, prompt_lookup_num_tokens=3)
                for _ in range(2)
            )
        assert sum(ids.shape[1] for ids in fed) > 2 * (first.shape[1] - 1)  # drafts were rejected
        assert choices.lengths.tolist() == [first.shape[1] - 1] * 2
        assert torch.equal(choices.token_ids.long(), torch.cat([first[0, :-1], second[0, :-1]]))
        with replay(mixtral, choices):
            got = seen(mixtral, input_ids=first)["model.layers.3.mlp"][0]
        assert torch.equal(got[:-1], tokens_of(choices, 0, "model.layers.3.mlp.experts").long())
    hook.remove()


def test_a_cropped_cache_goes_on_from_what_is_left(mixtral: Any) -> None:
    """In a record, and in a replay that crops it as well."""
    ids, drafts = torch.randint(3, 250, (2, 9)), torch.randint(3, 250, (2, 3))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0

    def run(steps: list[Tensor]) -> None:
        past = mixtral(input_ids=ids[:, :5], attention_mask=mask[:, :5], use_cache=True).past_key_values
        for step in steps:
            if drafted := past.get_seq_length() - 5:
                past.crop(-drafted)
            longer = torch.cat([mask[:, :5], torch.ones_like(step)], 1)
            mixtral(input_ids=step, attention_mask=longer, past_key_values=past, use_cache=True)

    with torch.no_grad(), record(mixtral) as choices:
        run([drafts, ids[:, 5:]])
    assert choices.lengths.tolist() == [7, 9]
    assert torch.equal(choices.token_ids.long(), ids[mask.bool()])
    with torch.no_grad(), replay(mixtral, choices):
        run([ids[:, 5:], ids[:, 5:]])


def test_padding_that_a_later_mask_names_is_left_out(mixtral: Any) -> None:
    """A sequence that ends early is fed padding until the others end; the mask of the next turn tells."""
    ids, mask = torch.randint(3, 250, (2, 10)), torch.ones(2, 10, dtype=torch.int64)
    mask[0, 5:7] = 0
    with torch.no_grad(), record(mixtral) as choices:
        past = mixtral(input_ids=ids[:, :5], use_cache=True).past_key_values
        for at in (5, 6):
            mixtral(input_ids=ids[:, at : at + 1], past_key_values=past, use_cache=True)
        mixtral(input_ids=ids[:, 7:], attention_mask=mask, past_key_values=past, use_cache=True)
    assert choices.lengths.tolist() == [8, 10]
    assert torch.equal(choices.token_ids.long(), ids[mask.bool()])
    with replay(mixtral, choices):
        got = seen(mixtral, input_ids=ids, attention_mask=mask)["model.layers.3.mlp"][0]
    assert torch.equal(got[mask.flatten().bool()], choices.layers["model.layers.3.mlp.experts"].topk_ids().long())


def test_records_of_a_model_and_of_its_wrapper_are_alike(mixtral: Any) -> None:
    """PEFT's generate calls the model inside; the names of layers are those of that model."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    prompts, mask = torch.randint(3, 250, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with record(mixtral) as plain:
        mixtral.generate(prompts, **options)
    wrapper = peft.get_peft_model(
        mixtral, peft.LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    )
    with record(wrapper) as choices:
        out = wrapper.generate(input_ids=prompts, **options)
    assert list(choices.layers) == list(plain.layers)
    assert choices.lengths.tolist() == [4, 8]
    assert torch.equal(choices.token_ids, plain.token_ids)
    full = nn.functional.pad(mask, (0, 3), value=1)
    with replay(wrapper, plain):
        wrapper(input_ids=out, attention_mask=full)
    with record(wrapper, layers=list(switchgear.RoutingTrace(wrapper)._found)[:1]) as some:
        wrapper(out, full)  # by position
    assert list(some.layers) == list(plain.layers)[:1]
    assert some.lengths.tolist() == [5, 9]


def test_recorded_on_switchgear_and_replayed_in_transformers(mixtral: Any) -> None:
    ids = torch.randint(3, 250, (2, 9))
    mixtral.config._experts_implementation = "switchgear"
    with record(mixtral) as choices, torch.no_grad():
        mixtral(input_ids=ids)
    mixtral.config._experts_implementation = "eager"
    move(mixtral)
    with replay(mixtral, choices):
        got = seen(mixtral, input_ids=ids)
    for name, (topk_ids, _) in got.items():
        assert torch.equal(topk_ids, choices.layers[f"{name}.experts"].topk_ids().long())


def test_an_encoder_is_refused() -> None:
    tiny = pytest.importorskip("tiny_models", reason="transformers is not installed")
    with raises(ValueError, "model"):
        record(tiny.build("switch_transformers")).__enter__()
    assert switchgear.routing.record is record
