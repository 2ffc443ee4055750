# SPDX-License-Identifier: BSD-3-Clause
"""RoutingTrace counts what the routers do, and changes nothing."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import switchgear
from errors import raises
from full_disk import full_disk
from made_tensors import MadeTensors
from switchgear import MoE, RoutingTrace
from switchgear.diagnostics import collect
from switchgear.monitoring import LoadMeter
from switchgear.routing import Capacity, TopP
from test_interventions import olmoe  # noqa: F401  a fixture

E, H, K = 8, 16, 2


class Model(nn.Module):
    """Two layers with different numbers of experts after an embedding."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, H)
        self.first = MoE(H, 12, E, **{"top_k": K, **options})
        self.second = MoE(H, 12, 4, 1)

    def forward(self, input_ids: Tensor) -> Tensor:
        y: Tensor = self.embedding(input_ids)
        return self.second(self.first(y))


def batches() -> list[Tensor]:
    return [torch.randint(30, (2, 9)), torch.randint(30, (3, 5)), torch.randint(30, (1, 1))]


def test_sums_are_those_of_the_routings() -> None:
    model, seen, inputs = Model(), [], batches()
    model.first.gate.register_forward_hook(lambda module, args, routing: seen.append(routing))
    plain = [model(batch) for batch in inputs]
    seen.clear()
    with RoutingTrace(model, by_token_id=True) as trace:
        traced = [model(batch) for batch in inputs]
    assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))
    layer = trace.layers["first.gate"]
    violation = float(layer.max_violation)  # before counts are read, which sums the calls that wait
    ids = torch.cat([routing.topk_ids for routing in seen])
    weights = torch.cat([routing.topk_weights for routing in seen]).double()
    assert torch.equal(layer.tokens_per_expert, torch.bincount(ids.flatten(), minlength=E))
    wanted = torch.zeros(E, dtype=torch.float64).index_add(0, ids.flatten(), weights.flatten().detach())
    torch.testing.assert_close(layer.weight_per_expert, wanted)
    assert (layer.num_tokens, layer.num_calls, int(layer.num_dropped)) == (34, 3, 0)
    p = torch.cat([routing.router_logits for routing in seen]).double().softmax(-1)
    torch.testing.assert_close(float(layer.entropy), float(torch.special.entr(p).detach().sum()), rtol=1e-5, atol=0)
    violations = [
        float(counts.max() / counts.double().mean() - 1)
        for counts in (torch.bincount(routing.topk_ids.flatten(), minlength=E) for routing in seen)
    ]
    torch.testing.assert_close(violation, sum(violations))

    by_id = layer.tokens_by_id()
    tokens = torch.cat([batch.flatten() for batch in inputs])
    assert set(by_id) == set(tokens.tolist())
    for token, counts in by_id.items():
        assert torch.equal(counts, torch.bincount(ids[tokens == token].flatten(), minlength=E))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_an_empty_batch_with_an_attention_mask_counts_nothing(shape: tuple[int, int]) -> None:
    class Masked(Model):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(input_ids)

    model, mask = Masked(), torch.ones(shape)
    with RoutingTrace(model, record=ALL, by_token_id=True) as trace:
        model(torch.zeros(shape, dtype=torch.int64), attention_mask=mask)
    layer = trace.layers["first.gate"]
    assert (layer.num_tokens, layer.num_calls, float(layer.max_violation)) == (0, 1, 0)
    assert not layer.tokens_per_expert.any()


def test_a_trace_is_not_entered_inside_itself() -> None:
    model = Model()
    with RoutingTrace(model) as trace:
        with raises(ValueError, "trace"), trace:
            pass
        model(batches()[0])
    with trace:
        model(batches()[0])
    assert trace.layers["first.gate"].num_calls == 2


def test_a_mask_is_not_taken_for_token_ids() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = MoE(H, 12, E, K)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y: Tensor = self.moe(x)
            return y

    model = Masked()
    with RoutingTrace(model, by_token_id=True) as trace:
        model(torch.randn(2, 3, H), torch.ones(2, 3, dtype=torch.bool))
    assert trace.layers["moe.gate"].tokens_by_id() == {}


def test_nothing_is_left_behind() -> None:
    model = Model()
    with RoutingTrace(model, by_token_id=True) as trace:
        model(batches()[0])
    model(batches()[0])
    assert trace.layers["first.gate"].num_calls == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with trace:  # again, accumulating
        model(batches()[0])
    assert trace.layers["first.gate"].num_calls == 2
    trace.reset()
    assert trace.summary() == []


def test_drops_and_empty_choices() -> None:
    model = Model(top_k=None, select=TopP(0.5), capacity=Capacity(0.5))
    with RoutingTrace(model) as trace:
        model(torch.randint(30, (4, 20)))
    layer, summary = trace.layers["first.gate"], trace.summary()[0]
    dropped = int(layer.num_dropped)
    assert dropped > 0
    assert summary.dropped == dropped / (dropped + int(layer.tokens_per_expert.sum()))
    assert LoadMeter(trace).read()["moe/dropped/first.gate"] == summary.dropped


def test_summary_of_a_known_trace() -> None:
    layer = switchgear.trace.LayerTrace(4)
    layer.add(torch.tensor([[0, 1], [0, -1]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.zeros(2, 4))
    trace = RoutingTrace()
    trace.layers["a"] = layer
    (row,) = trace.summary()
    assert (row.busiest, row.never_used, row.experts_per_token) == (0, 2, 1.5)
    assert math.isclose(row.router_entropy, 1.0, rel_tol=1e-6)  # uniform logits: log E
    assert math.isclose(row.max_violation, 2 / 0.75 - 1)
    assert math.isclose(row.mean_weight, 2 / 3)
    share = torch.tensor([2 / 3, 1 / 3])
    assert math.isclose(row.load_entropy, float(torch.special.entr(share).sum()) / math.log(4), rel_tol=1e-6)
    assert "a " in str(trace)


def test_save_and_load(tmp_path: Path) -> None:
    model = Model()
    with RoutingTrace(model, by_token_id=True) as trace:
        for batch in batches():
            model(batch)
    trace.save(tmp_path / "trace.pt")
    loaded = RoutingTrace.load(tmp_path / "trace.pt")
    assert loaded.summary() == trace.summary()
    for name, layer in trace.layers.items():
        other = loaded.layers[name].tokens_by_id()
        assert all(torch.equal(counts, other[token]) for token, counts in layer.tokens_by_id().items())
    with raises(ValueError), loaded:
        pass
    torch.save({"format": 0}, tmp_path / "other.pt")
    with raises(ValueError):
        RoutingTrace.load(tmp_path / "other.pt")


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    model = Model()
    with raises(ValueError):
        RoutingTrace(model).plot()
    with RoutingTrace(model) as trace:
        model(batches()[0])
    trace.plot(tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_errors_and_layers() -> None:
    with raises(ValueError, "model"):
        RoutingTrace(nn.Linear(2, 2))
    with raises(ValueError, "layers"):
        RoutingTrace(Model(), layers=["third"])
    model = Model()
    with RoutingTrace(model, layers=["second.gate"]) as trace:
        model(batches()[0])
    assert list(trace.layers) == ["second.gate"]


def test_many_calls_keep_distinct_pairs_alone() -> None:
    layer = switchgear.trace.LayerTrace(E)
    for _ in range(100):
        layer.add(torch.randint(E, (50, K)), torch.rand(50, K), token_ids=torch.randint(5, (50,)))
    assert sum(len(keys) for keys, _ in layer.pairs.parts) <= 17 * 5 * E
    assert sum(int(counts.sum()) for counts in layer.tokens_by_id().values()) == 100 * 50 * K


@pytest.mark.parametrize("how", ["name", "accelerate"])
def test_hugging_face(olmoe: Any, how: str) -> None:  # noqa: F811
    seen: list[Tensor] = []
    if how == "accelerate":
        olmoe.config._experts_implementation = "eager"
        switchgear.accelerate(olmoe)
    for layer in olmoe.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    ids = torch.randint(50, (2, 7))
    with torch.no_grad(), RoutingTrace(olmoe, by_token_id=True) as trace:
        olmoe(input_ids=ids)
    assert list(trace.layers) == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    for layer, chosen in zip(trace.layers.values(), seen, strict=True):
        assert torch.equal(layer.tokens_per_expert, torch.bincount(chosen.flatten(), minlength=E))
        assert set(layer.tokens_by_id()) == set(ids.flatten().tolist())
    assert 0.9 < trace.summary()[0].router_entropy <= 1


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.moe = nn.Embedding(20, 16), MoE(16, 8, 4, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.moe(self.embedding(input_ids))
        return y


def test_models_in_wrappers() -> None:
    """Padding and ids are those of the model inside, however the wrapper is called."""
    ids, mask = torch.randint(20, (2, 5)), torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for wrap in (lambda model: model, DistributedDataParallel, lambda model: torch.compile(model, backend="eager")):
            model = wrap(Padded())
            for args, kwargs in (((ids,), {"attention_mask": mask}), ((ids, mask), {})):
                with RoutingTrace(model, by_token_id=True) as trace, collect(model) as choices:
                    getattr(model, "_orig_mod", model)(*args, **kwargs)  # as `generate` of a compiled model
                (layer,), (kept,) = trace.layers.values(), choices.values()
                assert layer.num_tokens == kept.num_tokens == 7
                assert kept.examples.bincount().tolist() == [2, 5]
                assert sum(int(row.sum()) for row in layer.tokens_by_id().values()) == 7 * 2
    finally:
        dist.destroy_process_group()


def test_generate_of_a_peft_model() -> None:
    """It calls the model inside."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from tiny_models import build

    model = peft.get_peft_model(build("mixtral"), peft.LoraConfig(target_modules=["q_proj"]))
    ids, mask = torch.randint(3, 20, (2, 5)), torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    with RoutingTrace(model, by_token_id=True) as trace:
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    for layer in trace.layers.values():
        assert layer.num_tokens == 7 + 2 * 2
        assert sum(int(row.sum()) for row in layer.tokens_by_id().values()) == 11 * 2


def test_modules_with_a_forward_of_their_own() -> None:
    """Llama 4 has experts that transformers does not dispatch: accelerate swaps the forward of the block around
    them."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    config = transformers.Llama4TextConfig(hidden_size=16, intermediate_size=8, num_local_experts=4)
    block = nn.Sequential(Llama4TextMoe(config))
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    switchgear.accelerate(block)
    with torch.no_grad(), RoutingTrace(block) as trace:
        block(torch.randn(1, 6, 16))
    (layer,) = trace.layers.values()
    assert int(layer.tokens_per_expert.sum()) == 6 * config.num_experts_per_tok


@pytest.mark.parametrize("how", ["reentrant", "whole", "selective"])
def test_recomputed_tokens_count_once(how: str) -> None:
    """Selective checkpointing saves all ops here; those of the trace are none of them."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    options: dict[str, Any] = {"use_reentrant": how == "reentrant"}
    if how == "selective":
        save_all = lambda *args, **kwargs: CheckpointPolicy.MUST_SAVE  # noqa: E731
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(save_all)
    model = switchgear.MoE(64, 64, 4, 2)
    x = torch.randn(6, 64, requires_grad=True)
    with switchgear.RoutingTrace(model) as trace:
        checkpoint(model, x, **options).sum().backward()
        checkpoint(model, x, **options).sum().backward()
    (layer,) = trace.layers.values()
    assert x.grad is not None
    assert (layer.num_calls, layer.num_tokens, int(layer.tokens_per_expert.sum())) == (2, 12, 24)


def test_recomputed_tokens_of_a_hugging_face_model_count_once() -> None:
    transformers = pytest.importorskip("tiny_models", reason="transformers is not installed")
    model = transformers.build("mixtral").train()
    switchgear.accelerate(model)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    inputs = transformers.example_inputs(model)
    with switchgear.RoutingTrace(model) as trace:
        model(**inputs, use_cache=False).logits.sum().backward()
    assert {layer.num_tokens for layer in trace.layers.values()} == {inputs["input_ids"].numel()}


def test_only_a_file_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe and a folder are refused before anything is written."""
    os.mkfifo(pipe := tmp_path / "pipe")
    monkeypatch.setattr(torch, "save", None)
    with raises(ValueError, "path"):
        RoutingTrace().save(pipe)
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        RoutingTrace().save(tmp_path)
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_failed_save_keeps_the_earlier_file(tmp_path: Path) -> None:
    with RoutingTrace(model := Model()) as trace:
        model(batches()[0])
    path = tmp_path / "trace"
    trace.save(path)
    with full_disk(), raises(OSError):
        trace.save(path)
    assert str(RoutingTrace.load(path)) == str(trace)
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_keeps_leading_to_the_file(tmp_path: Path) -> None:
    with RoutingTrace(model := Model()) as trace:
        model(batches()[0])
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "trace")
    trace.save(link)
    assert link.is_symlink()
    assert str(RoutingTrace.load(tmp_path / "trace")) == str(trace)


def test_files_of_others(tmp_path: Path) -> None:
    """Whatever a file holds, load raises ValueError for it, and FileNotFoundError for none."""
    with RoutingTrace(model := Model(), by_token_id=True) as trace:
        model(batches()[0])
    trace.save(tmp_path / "good")
    good = torch.load(tmp_path / "good", weights_only=True)

    def spoiled(**changes: Any) -> dict[str, Any]:
        layers = {name: {**state, **changes} for name, state in good["layers"].items()}
        return {**good, "layers": layers}

    states: list[Any] = [
        {}, [], 3, torch.zeros(2), {**good, "format": 99}, {"format": 1}, {**good, "layers": 3},
        {**good, "layers": {"a": {}}},
        spoiled(sizes=[1]), spoiled(sizes="ab"), spoiled(pairs=None), spoiled(counts=torch.zeros(1, dtype=torch.int64)),
        spoiled(tokens_per_expert=torch.zeros(3)), spoiled(tokens_per_expert=torch.tensor(0)), spoiled(entropy=1.0),
        spoiled(weight_per_expert=torch.zeros(3, dtype=torch.float64)),
    ]  # fmt: skip
    for state in states:
        torch.save(state, tmp_path / "bad")
        with raises(ValueError, "path"):
            RoutingTrace.load(tmp_path / "bad")
    for data in (b"", b"text", (tmp_path / "good").read_bytes()[:-200]):
        (tmp_path / "bad").write_bytes(data)
        with raises(ValueError, "path"):
            RoutingTrace.load(tmp_path / "bad")
    with pytest.raises(FileNotFoundError):
        RoutingTrace.load(tmp_path / "none")


# ---- what else a trace records ---------------------------------------------------------------------------------------

ALL = ("counts", "weights", "entropy", "probabilities", "norms", "inputs", "coactivation")


def check_everything(layer: Any, x: Tensor, logits: Tensor, ids: Tensor, weights: Tensor, outputs: Tensor) -> None:
    """All sums of a layer against loops over tokens x [T,H], without padding; outputs [T,K,H] of their experts."""
    num_experts = layer.num_experts
    together = torch.zeros(num_experts, num_experts, dtype=torch.int64)
    norms, mass = torch.zeros(num_experts, dtype=torch.float64), torch.zeros(num_experts, dtype=torch.float64)
    for row, row_weights, row_outputs in zip(ids.tolist(), weights.tolist(), outputs, strict=True):
        for a, weight, output in zip(row, row_weights, row_outputs, strict=True):
            mass[a] += weight
            norms[a] += float(output.double().square().sum().sqrt())
            for b in row:
                together[a, b] += 1
    assert torch.equal(layer.coactivation, together)
    assert torch.equal(layer.tokens_per_expert, together.diagonal())
    torch.testing.assert_close(layer.weight_per_expert, mass)
    torch.testing.assert_close(layer.norm_per_expert, norms, rtol=1e-5, atol=0)
    p = logits.double().softmax(-1)
    torch.testing.assert_close(layer.probability_per_expert, p.sum(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(float(layer.entropy), float(torch.special.entr(p).sum()), rtol=1e-5, atol=0)
    assert (layer.num_tokens, len(layer.sample.inputs)) == (len(x), min(len(x), layer.sample.size))
    for kept, kept_ids in zip(layer.sample.inputs, layer.sample.topk_ids, strict=True):
        (same,) = (x == kept).all(1).nonzero().flatten().tolist()
        assert torch.equal(kept_ids.long(), ids[same].long())


def loop_outputs(experts: Any, x: Tensor, ids: Tensor) -> Tensor:
    """[T,K,H]: experts with silu gates, from their weights."""
    rows = []
    for token, row in zip(x, ids.tolist(), strict=True):
        h = [experts.gate_up_proj[e] @ token for e in row]
        rows.append(torch.stack([
            experts.down_proj[e] @ (nn.functional.silu(one.chunk(2)[0]) * one.chunk(2)[1])
            for e, one in zip(row, h, strict=True)
        ]))  # fmt: skip
    return torch.stack(rows)


@torch.no_grad()
def test_everything_of_our_layer() -> None:
    moe, seen = MoE(H, 12, E, K), []
    moe.gate.register_forward_hook(lambda module, args, routing: seen.append(routing))
    calls = [torch.randn(40, H) for _ in range(3)]
    with RoutingTrace(moe, record=ALL, tokens=25) as trace:
        for x in calls:
            moe(x)
    logits, ids, weights = (
        torch.cat([getattr(r, name) for r in seen]) for name in ("router_logits", "topk_ids", "topk_weights")
    )
    x = torch.cat(calls)
    check_everything(trace.layers["gate"], x, logits, ids, weights, loop_outputs(moe.experts, x, ids))


@pytest.mark.parametrize("how", ["eager", "switchgear"])
@torch.no_grad()
def test_everything_of_a_hugging_face_layer(how: str) -> None:
    tiny = pytest.importorskip("tiny_models", reason="transformers is not installed")
    model = tiny.build("mixtral")
    model.config._experts_implementation = how
    gate, experts = model.model.layers[1].mlp.gate, model.model.layers[1].mlp.experts
    seen: list[tuple[Any, ...]] = []
    gate.register_forward_hook(lambda module, args, output: seen.append((args[0].reshape(-1, 64), *output)))
    ids = torch.randint(3, 250, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :1] = 0, 0
    with RoutingTrace(model, record=ALL, tokens=100) as trace:
        for _ in range(2):
            model(input_ids=ids.roll(len(seen), 1), attention_mask=mask)
    rows = mask.flatten().bool()
    x, logits, weights, chosen = (torch.cat([call[i][rows] for call in seen[:2]]) for i in range(4))
    outputs = loop_outputs(experts, x, chosen)
    check_everything(trace.layers["model.layers.1.mlp.experts"], x, logits, chosen, weights, outputs)


def test_all_that_is_recorded_is_saved(tmp_path: Path) -> None:
    model = Model()
    with RoutingTrace(model, record=ALL) as trace:
        model(batches()[0])
    trace.save(tmp_path / "trace.pt")
    loaded = RoutingTrace.load(tmp_path / "trace.pt")
    for name, layer in trace.layers.items():
        again = loaded.layers[name]
        assert again.record == layer.record
        for attribute in ("probability_per_expert", "norm_per_expert", "coactivation", "entropy"):
            assert torch.equal(getattr(again, attribute), getattr(layer, attribute))
        assert torch.equal(again.sample.inputs, layer.sample.inputs)
    with RoutingTrace(model, record=("counts",)) as trace:
        model(batches()[0])
    assert trace.layers["first.gate"].weight_per_expert is None
    assert math.isnan(trace.summary()[0].router_entropy)
    trace.save(tmp_path / "trace.pt")
    loaded = RoutingTrace.load(tmp_path / "trace.pt")
    assert loaded.record == loaded.layers["first.gate"].record == ("counts",)


def test_files_of_earlier_versions_load(tmp_path: Path) -> None:
    layer = {
        "tokens_per_expert": torch.tensor([3, 1]), "weight_per_expert": torch.tensor([1.5, 0.5]).double(),
        "entropy": torch.tensor(0.25).double(), "max_violation": torch.tensor(0.5).double(),
        "num_dropped": torch.tensor(0), "pairs": torch.tensor([1]), "counts": torch.tensor([4]), "sizes": [4, 1],
    }  # fmt: skip
    torch.save({"format": 1, "by_token_id": True, "layers": {"gate": layer}}, tmp_path / "old.pt")
    loaded = RoutingTrace.load(tmp_path / "old.pt").layers["gate"]
    assert (loaded.num_tokens, loaded.num_calls, float(loaded.entropy)) == (4, 1, 0.25)
    assert loaded.tokens_by_id()[0].tolist() == [0, 4]


def test_memory_is_bounded() -> None:
    layer = switchgear.trace.LayerTrace(E, record=ALL, tokens=50)
    for _ in range(200):
        layer.add(torch.randint(E, (30, K)), torch.rand(30, K), x=torch.randn(30, H), norms=torch.rand(30, K))
    assert len(layer._waiting) < 64
    assert layer.sample is not None
    assert layer.sample.inputs.shape == (50, H)
    assert int(layer.tokens_per_expert.sum()) == 200 * 30 * K


def test_a_sample_tells_tokens_apart() -> None:
    """20,000 of 2^24 keys would be equal some ten times, and the largest ones soon be taken."""
    sample = switchgear.trace.layer.TokenSample(20_000)
    sample.add(torch.zeros(20_000, 1), torch.zeros(20_000, 1, dtype=torch.int32), torch.ones(20_000, 1))
    keys, *rows = sample.state()
    assert len(keys.unique()) == 20_000
    earlier = switchgear.trace.layer.TokenSample.of_state([torch.tensor([0.25, 0.75]), *(row[:2] for row in rows)])
    assert earlier.state()[0].tolist() == [2**60, 3 * 2**60]


def test_padding_is_not_sampled() -> None:
    layer, x = switchgear.trace.LayerTrace(2, record=("inputs",)), torch.arange(5.0)[:, None]
    ids, mask = torch.tensor([[0], [1], [0], [1], [1]]), torch.tensor([True, False, True, True, False])
    layer.add(ids, torch.ones(5, 1), x=x, token_mask=mask)
    pairs = torch.cat([layer.sample.inputs, layer.sample.topk_ids], 1).tolist()
    assert sorted(pairs) == [[0, 0], [2, 0], [3, 1]]


def test_norms_of_longcat() -> None:
    """Also by its own loop, which fails with one choice per token, and in a class that extends the model's."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from switchgear.integrations.transformers import accelerate
    from tiny_models import build, example_inputs

    model, norms = build("longcat_flash"), []
    for _ in range(2):
        with RoutingTrace(model, record=("norms",)) as trace, torch.no_grad():
            model(**example_inputs(model))
        norms.append(torch.stack([layer.norm_per_expert for layer in trace.layers.values()]))
        accelerate(model)
    assert norms[0].any()
    torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-4)


def test_norms_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, x, sizes = switchgear.MoE(H, 8, E, K), torch.randn(50, H), []
    add = switchgear.trace.LayerTrace.add

    def seen(layer: Any, *args: Tensor | None) -> None:
        sizes.extend(tensor.numel() for tensor in args if tensor is not None)
        add(layer, *args)

    monkeypatch.setattr(switchgear.trace.LayerTrace, "add", seen)
    norms = []
    for rows in (8192, 7 * K):
        monkeypatch.setattr("switchgear.trace.routing_trace._ROWS", rows)
        with RoutingTrace(moe, record=("norms",)) as trace:
            moe(x)
        norms.append(trace.layers["gate"].norm_per_expert)
    torch.testing.assert_close(*norms)
    assert max(sizes) == 50 * H  # the input; all outputs would be K times as large
    with RoutingTrace(moe.double(), record=("norms",)) as trace:
        moe(x.double())
    torch.testing.assert_close(trace.layers["gate"].norm_per_expert, norms[0], rtol=1e-5, atol=0)


def test_pairs_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(E, (50, 6))
    layers = [switchgear.trace.LayerTrace(E, record=("coactivation",)) for _ in range(2)]
    layers[0].add(ids, torch.ones(50, 6))
    monkeypatch.setattr("switchgear.trace.layer._PAIRS", 3 * 6 * 6)
    with MadeTensors() as made:
        layers[1].add(ids, torch.ones(50, 6))
    assert torch.equal(layers[0].coactivation, layers[1].coactivation)
    assert 0 < max(made.num_bytes) < 50 * 6 * 6 * 8


def test_a_sample_is_uniform() -> None:
    """Each of 40 tokens stays with probability 1/4: in 400 recordings 100 times, with a spread of 8.7."""
    counts = torch.zeros(40)
    for seed in range(400):
        sample = switchgear.trace.layer.TokenSample(10)
        sample._generator.manual_seed(seed)
        for part in torch.arange(40.0)[:, None].split(7):
            sample.add(part, torch.zeros(len(part), 1, dtype=torch.int32), torch.ones(len(part), 1))
        counts[sample.inputs.flatten().long()] += 1
    assert counts.sum() == 4000
    assert (counts - 100).abs().max() < 5 * 8.7


def test_what_cannot_be_recorded() -> None:
    with raises(ValueError, "record"):
        RoutingTrace(Model(), record=("colours",))
    with raises(ValueError):
        RoutingTrace(switchgear.Router(H, E, K), record=("norms",))
