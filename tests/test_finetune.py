# SPDX-License-Identifier: BSD-3-Clause
"""Training some experts alone: which ones, that nothing else changes, state dicts and files."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import switchgear
from errors import raises
from flops import count_flops
from full_disk import full_disk
from switchgear import finetune
from switchgear.trace import LayerTrace
from switchgear.weights.selected import Selection, selection_of

SELECTION = {"0.gate": [1, 4], "2": [0]}


def make_model(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    moe = switchgear.MoE
    return nn.Sequential(moe(16, 8, 6, 2, **options), nn.Linear(16, 16), moe(16, 8, 4, 1), moe(16, 8, 4, 1))


def loss_of(model: nn.Module, seed: int = 1) -> Tensor:
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(seed))
    loss: Tensor = model(x).square().mean()
    return loss


def train(model: nn.Module, parameters: list[nn.Parameter], steps: int = 20) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- which experts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["token", "gate"])
@pytest.mark.parametrize("mass", [0.05, 0.2, 0.5, 0.95, 1.0])
def test_row71_selection_is_the_smallest_set(by: str, mass: float) -> None:
    """Against all subsets: none smaller reaches the mass, and none of the same size has a larger score."""
    torch.manual_seed(0)
    trace = switchgear.RoutingTrace()
    for name in "abc":
        trace.layers[name] = LayerTrace(6)
        probabilities = torch.rand(200, 6) ** 4
        weights, ids = probabilities.softmax(-1).topk(2)
        trace.layers[name].add(ids.int(), weights)
    selected = finetune.select_experts(trace, mass, by)
    for name, layer in trace.layers.items():
        scores = layer.tokens_per_expert.double() / 400 if by == "token" else layer.weight_per_expert.double() / 200
        assert float(scores[:5].sum()) < 1
        total = float(scores[selected[name]].sum())
        if float(scores.sum()) < mass - 1e-9:
            assert selected[name] == [e for e in range(6) if scores[e] > 0]
            continue
        assert total >= mass - 1e-9
        for size in range(len(selected[name]) + 1):
            for subset in itertools.combinations(range(6), size):
                other = float(scores[list(subset)].sum())
                assert other < mass - 1e-12 if size < len(selected[name]) else other <= total + 1e-12


def test_selected_virtual_experts_have_no_weights_to_train() -> None:
    model = nn.Sequential(switchgear.MoE(16, 8, 4, 2, null_experts=2, constant_experts=1))
    with switchgear.RoutingTrace(model) as trace, torch.no_grad():
        model(torch.randn(64, 16))
    selection = finetune.select_experts(trace, 1.0)
    assert selection == {"0.gate": list(range(7))}
    trained = finetune.freeze_except(model, selection)
    assert finetune.selected_experts(model) == {"0.experts.experts": [0, 1, 2, 3]}
    assert {len(parameter) for parameter in trained} == {4}
    finetune.unfreeze(model)
    with raises(ValueError, "selection"):
        finetune.freeze_except(model, {"0": [7]})


def test_row71_selection_errors() -> None:
    trace = switchgear.RoutingTrace()
    with raises(ValueError):
        finetune.select_experts(trace)
    with raises(TypeError, "trace"):
        finetune.select_experts({})
    trace.layers["a"] = LayerTrace(4)
    with raises(ValueError):
        finetune.select_experts(trace)
    trace.layers["a"].add(torch.tensor([[2]]), torch.ones(1, 1))
    assert finetune.select_experts(trace, by="gate") == {"a": [2]}
    for mass in (0.0, 1.5, float("nan")):
        with raises(ValueError):
            finetune.select_experts(trace, mass)
    with raises(ValueError):
        finetune.select_experts(trace, by="weight")


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bias": True, "transposed": True}, {"gated": False, "activation": "gelu"}])
def test_row71_only_selected_experts_change(options: dict[str, Any]) -> None:
    """20 steps of AdamW with weight decay: every other bit of the model stays."""
    model = make_model(**options)
    before, loss = state_of(model), loss_of(model)
    trained = finetune.freeze_except(model, SELECTION)
    assert torch.equal(loss_of(model), loss)
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    train(model, trained)
    after = state_of(model)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        chosen = [1, 4] if name.startswith("0.experts") else [0] if name.startswith("2.experts") else []
        for expert in range(len(tensor) if chosen else 0):
            assert torch.equal(after[name][expert], tensor[expert]) == (expert not in chosen), f"{name}[{expert}]"
        if not chosen:
            assert torch.equal(after[name], tensor), name


def test_row71_trains_like_slices_of_the_whole() -> None:
    """The same bits as an optimizer that gets the slices of the whole gradients."""
    model, whole = make_model(bias=True), make_model(bias=True)
    train(model, finetune.freeze_except(model, {"0": [1, 4]}), steps=5)
    experts = whole[0].experts
    slices = {name: nn.Parameter(p.detach()[[1, 4]]) for name, p in experts.named_parameters()}
    optimizer = torch.optim.AdamW(slices.values(), lr=1e-2, weight_decay=0.1)
    for step in range(5):
        whole.zero_grad()
        loss_of(whole, step).backward()
        for name, parameter in experts.named_parameters():
            slices[name].grad = parameter.grad[[1, 4]]
        optimizer.step()
        for name, parameter in experts.named_parameters():
            parameter.data[[1, 4]] = slices[name].detach()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_row71_weight_gradients_of_selected_experts_alone() -> None:
    """Work of the backward pass: that of a frozen layer, and the weight gradients of the selected rows."""
    torch.manual_seed(0)
    layer = switchgear.MoE(32, 16, 8, 2)
    x = torch.randn(64, 32, requires_grad=True)
    rows = torch.bincount(layer.gate(x).topk_ids.flatten().long(), minlength=8)
    work = {}
    for chosen in ([], [3], [1, 3, 5, 6]):
        finetune.freeze_except(layer, {"experts": chosen})
        y = layer(x)
        work[len(chosen)] = count_flops(lambda y=y: y.sum().backward())
        finetune.unfreeze(layer)
    per_row = 2 * 3 * 16 * 32
    assert work[1] - work[0] == per_row * int(rows[3])
    assert work[4] - work[0] == per_row * int(rows[[1, 3, 5, 6]].sum())


def test_parameters_beside_the_experts() -> None:
    model = make_model()
    router, before = model[0].gate.weight, model[2].gate.weight.clone()
    trained = finetune.freeze_except(model, {"0": [5]}, also=["0.gate"])
    assert any(parameter is router for parameter in trained)
    train(model, trained, steps=2)
    assert router.grad.any()
    assert torch.equal(model[2].gate.weight, before)
    assert finetune.selected_experts(model) == {"0.experts": [5]}


def test_all_else_of_a_module_trains_beside_its_selected_experts() -> None:
    model = make_model()
    trained = finetune.freeze_except(model, {"0": [5], "2": []}, also=["0", "2.experts"])
    rows = [model[0].experts.gate_up_proj_selected, model[0].experts.down_proj_selected]
    others = [model[0].gate.weight, *model[2].experts.parameters()]
    assert list(map(id, trained)) == list(map(id, [*rows, *others]))


@pytest.mark.parametrize("name", ["0.experts", "0.experts.down_proj"])
def test_selected_experts_do_not_train_as_a_whole(name: str) -> None:
    model = make_model()
    with raises(ValueError, "also"):
        finetune.freeze_except(model, {"0": [1]}, also=[name])
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("between", ["nothing", "eval", "train"])
def test_optimizers_that_write_data_train(between: str) -> None:
    """As some do, which leaves no trace in versions. With a forward without gradients before the step, too."""
    model, other = make_model(), make_model()
    before = model.state_dict()["0.experts.down_proj"].clone()
    for net, writes_data in ((model, True), (other, False)):
        trained = finetune.freeze_except(net, SELECTION)
        for step in range(3):
            loss = loss_of(net, step)
            if between != "nothing":
                with torch.no_grad():
                    loss_of(net.train(between == "train"))
                net.train()
            grads = torch.autograd.grad(loss, trained)
            with torch.no_grad():
                for parameter, grad in zip(trained, grads, strict=True):
                    (parameter.data if writes_data else parameter).add_(grad.sign(), alpha=-1e-2)
    assert not torch.equal(model.state_dict()["0.experts.down_proj"], before)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())
    model[0].experts.down_proj_selected.data.zero_()
    finetune.unfreeze(model)
    assert not model[0].experts.down_proj[[1, 4]].any()


def test_inference_copies_what_changed_alone() -> None:
    model = make_model().eval()
    finetune.freeze_except(model, SELECTION)
    selection = selection_of(model[0].experts)
    assert selection is not None
    copied: list[str] = []
    selection._copy = lambda module, name: (copied.append(name), Selection._copy(selection, module, name))
    with torch.no_grad():
        for _ in range(3):
            loss_of(model)
        assert copied == ["gate_up_proj", "down_proj"]
        model[0].experts.down_proj_selected.zero_()
        loss_of(model)
    assert copied == ["gate_up_proj", "down_proj", "down_proj"]
    assert not model[0].experts.down_proj[4].any()


def test_unfreeze_restores_what_required_gradients() -> None:
    model = make_model()
    model[1].requires_grad_(False)
    names = [(name, p.requires_grad) for name, p in model.named_parameters()]
    identities = [id(p) for p in model.parameters()]
    train(model, finetune.freeze_except(model, SELECTION), steps=2)
    loss, state = loss_of(model), state_of(model)
    finetune.unfreeze(model)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == names
    assert [id(p) for p in model.parameters()] == identities
    assert torch.equal(loss_of(model), loss)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    loss_of(model).backward()
    assert model[0].experts.gate_up_proj.grad is not None
    finetune.unfreeze(model)
    finetune.freeze_except(model, SELECTION)


@pytest.mark.parametrize("also", [[], ["2"]])
def test_unfreeze_restores_parts_and_repeated_calls(also: list[str]) -> None:
    def flags(model: nn.Module) -> list[bool]:
        return [parameter.requires_grad for parameter in model.parameters()]

    model = make_model()
    model[0].experts.down_proj.requires_grad_(False)
    before = flags(model)
    finetune.freeze_except(model[0], {"gate": [1]})
    finetune.unfreeze(model)
    assert flags(model) == before
    for _ in range(2):
        finetune.freeze_except(model, {"0": []}, also=also)
    finetune.unfreeze(model)
    assert flags(model) == before
    finetune.freeze_except(model, SELECTION, also=also)
    finetune.unfreeze(model[0])
    assert flags(model[0]) == before[:3]
    assert not model[1].weight.requires_grad
    finetune.unfreeze(model)
    assert flags(model) == before


def test_copies_and_dtypes() -> None:
    """A copy trains by itself; a conversion keeps both in step."""
    model = make_model()
    finetune.freeze_except(model, SELECTION)
    other = copy.deepcopy(model)
    train(other, [p for p in other.parameters() if p.requires_grad], steps=1)
    assert not torch.equal(loss_of(other), loss_of(model))
    other.double()
    with torch.no_grad():
        other[0].experts.gate_up_proj_selected.zero_()
    other(torch.zeros(1, 16, dtype=torch.float64))
    assert not other.state_dict()["0.experts.gate_up_proj"][4].any()


def test_forwards_before_a_backward() -> None:
    """Gradient accumulation, checkpointing, and a change between forward and backward, which raises."""
    model = make_model()
    trained = finetune.freeze_except(model, SELECTION)
    (loss_of(model, 0) + loss_of(model, 1)).backward()
    wanted = [p.grad.clone() for p in trained]
    model.zero_grad()
    x = [torch.randn(24, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    for rows in x:
        checkpoint(lambda rows: model(rows).square().mean(), rows, use_reentrant=False).backward()
    for parameter, grad in zip(trained, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    loss = loss_of(model)
    with torch.no_grad():
        trained[0].mul_(2)
    with torch.no_grad():
        loss_of(model)  # writes the new values into what the first forward saved
    with raises(RuntimeError):
        loss.backward()


def test_compiled_models_train_the_selected_experts() -> None:
    model, other = make_model(), make_model()
    trained = finetune.freeze_except(model, SELECTION)
    compiled = torch.compile(model, backend="aot_eager")
    train(compiled, trained, steps=2)
    train(other, finetune.freeze_except(other, SELECTION), steps=2)
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def test_autocast_trains_the_selected_experts() -> None:
    model = make_model()
    trained = finetune.freeze_except(model, SELECTION)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model).backward()
    assert all(p.grad.dtype == torch.float32 for p in trained)
    assert all(p.grad.any() for p in trained[:2])


# ---- state dicts and files -------------------------------------------------------------------------------------------


def test_state_dicts_keep_their_keys() -> None:
    model = make_model()
    keys = list(model.state_dict())
    trained = finetune.freeze_except(model, SELECTION)
    train(model, trained, steps=2)
    assert list(model.state_dict()) == keys
    plain = make_model()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(loss_of(plain), loss_of(model))
    fresh = make_model()
    finetune.freeze_except(fresh, {"0": [0, 1], "3": [1, 2]})
    for assign in (False, True):
        fresh.load_state_dict(model.state_dict(), assign=assign)
        assert torch.equal(loss_of(fresh), loss_of(model))
    incomplete = {name: t for name, t in model.state_dict().items() if name != "0.experts.down_proj"}
    with raises(RuntimeError):
        fresh.load_state_dict(incomplete)


@pytest.mark.parametrize("also", [[], ["0.gate"]])
def test_row71_file_holds_the_selected_experts(tmp_path: Path, also: list[str]) -> None:
    model = nn.Sequential(switchgear.MoE(64, 96, 8, 2))
    base = copy.deepcopy(model)
    trained = finetune.freeze_except(model, {"0": [2, 5]}, also=also)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(1)
    finetune.save_selected(model, tmp_path / "file.pt")
    size = sum(parameter.nbytes for parameter in trained)
    assert size <= (tmp_path / "file.pt").stat().st_size <= size + 4096
    assert finetune.load_selected(base, tmp_path / "file.pt") == {"0.experts": [2, 5]}
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in base.state_dict().items())
    x = torch.randn(7, 64)
    assert torch.equal(base(x), model(x))
    finetune.freeze_except(base, {"0": [2]})  # into experts that train already, too
    with torch.no_grad():
        base[0].experts.down_proj_selected.zero_()
    finetune.load_selected(base, tmp_path / "file.pt")
    assert torch.equal(base(x), model(x))


def test_a_failed_save_keeps_the_earlier_file(tmp_path: Path) -> None:
    model = make_model()
    finetune.freeze_except(model, SELECTION)
    path = tmp_path / "experts.pt"
    finetune.save_selected(model, path)
    with full_disk(), raises(OSError):
        finetune.save_selected(model, path)
    assert finetune.load_selected(model, path) == {"0.experts": [1, 4], "2.experts": [0]}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("options", "name"), [({"gated": False}, "transposed"), ({}, "interleaved")])
def test_files_of_another_layout_are_refused(options: dict[str, Any], name: str, tmp_path: Path) -> None:
    """Of matrices with the same shape in both layouts; files without a layout, of earlier versions, load."""
    model = nn.Sequential(switchgear.MoE(8, 8, 4, 1, **options))
    other = nn.Sequential(switchgear.MoE(8, 8, 4, 1, **options, **{name: True}))
    finetune.freeze_except(model, {"0": [1]})
    path = tmp_path / "experts.pt"
    finetune.save_selected(model, path)
    before = state_of(other)
    with raises(ValueError, "path"):
        finetune.load_selected(other, path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in other.state_dict().items())
    assert finetune.load_selected(model, path) == {"0.experts": [1]}
    data = torch.load(path)
    del data["layouts"]
    torch.save(data, path)
    assert finetune.load_selected(other, path) == {"0.experts": [1]}


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    model = make_model()
    with raises(ValueError):
        finetune.save_selected(model, tmp_path / "none.pt")
    finetune.freeze_except(model, SELECTION)
    finetune.save_selected(model, tmp_path / "good.pt")
    good = torch.load(tmp_path / "good.pt")
    wrong: list[Callable[[Any], Any]] = [
        lambda data: data["experts"].update({"9": data["experts"]["2.experts"]}),
        lambda data: data["experts"]["2.experts"].update({"other": torch.zeros(1, 16, 8)}),
        lambda data: data["experts"]["2.experts"].update({"down_proj": torch.zeros(1, 16, 9)}),
        lambda data: data["experts"]["2.experts"].update({"experts": torch.tensor([4], dtype=torch.int32)}),
        lambda data: data["experts"]["2.experts"].update({"experts": torch.tensor([0])}),
        lambda data: data["others"].update({"1.weight": torch.zeros(3)}),
        lambda data: data.update({"format": 9}),
        lambda data: data.update({"layouts": 3}),
        lambda data: data["layouts"].update({"2.experts": {"transposed": torch.zeros(2)}}),
    ]
    fresh = make_model()
    before = state_of(fresh)
    for spoil in wrong:
        data = copy.deepcopy(good)
        spoil(data)
        torch.save(data, tmp_path / "bad.pt")
        with raises(ValueError):
            finetune.load_selected(fresh, tmp_path / "bad.pt")
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    with raises(ValueError):
        finetune.load_selected(fresh, tmp_path / "bad.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


# ---- errors ----------------------------------------------------------------------------------------------------------


def shared_experts() -> nn.Module:
    model = make_model()
    model[3].experts.down_proj = model[2].experts.down_proj
    return model


def stored() -> nn.Module:
    model = make_model()
    switchgear.store(model, "int8")
    return model


@pytest.mark.parametrize(
    ("make", "selection", "error", "message"),
    [
        (make_model, {"0": [1], "7": [0]}, ValueError, "selection"),
        (make_model, {"0": [1], "1": [0]}, ValueError, "selection"),
        (make_model, {"0": [1], "0.experts.down_proj": [0]}, ValueError, "selection"),
        (make_model, {"0": [1], "2": [4]}, ValueError, "selection"),
        (make_model, {"0": [-1]}, ValueError, "selection"),
        (make_model, {"0": [1, 1]}, ValueError, "once"),
        (make_model, {"0": [1.5]}, TypeError, "int"),
        (make_model, ["0"], TypeError, "selection"),
        (make_model, {"0": [1], "0.gate": [2]}, ValueError, "once"),
        (shared_experts, {"2": [1]}, ValueError, "sharing"),
        (stored, {"2": [1]}, ValueError, "restore"),
    ],
)
def test_nothing_is_frozen_on_failure(
    make: Callable[[], nn.Module], selection: Any, error: type[Exception], message: str
) -> None:
    model = make()
    before = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    with raises(error, message):
        finetune.freeze_except(model, selection)
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == before


def test_frozen_models_are_not_frozen_again_or_stored() -> None:
    model = make_model()
    with raises(ValueError):
        finetune.freeze_except(model, SELECTION, also=["9"])
    finetune.freeze_except(model, SELECTION)
    with raises(ValueError):
        finetune.freeze_except(model, SELECTION)
    for form in ("compact", "plain"):
        with raises(ValueError):
            switchgear.store(model, form)
    with raises(ValueError):
        switchgear.adapters.add_lora(model[0].experts, 2)
    for call in (
        lambda m: finetune.freeze_except(m, SELECTION), finetune.unfreeze, finetune.selected_experts,
        lambda m: finetune.save_selected(m, "none"), lambda m: finetune.load_selected(m, "none"),
    ):  # fmt: skip
        with raises(TypeError, "model"):
            call("model")
    adapted = make_model()
    switchgear.adapters.add_lora(adapted[0].experts, 2)
    with raises(ValueError):
        finetune.freeze_except(adapted, SELECTION)


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_row71_hugging_face_models(model_type: str, tmp_path: Path) -> None:
    tiny = pytest.importorskip("tiny_models", reason="transformers is not installed")
    model = tiny.build(model_type)
    inputs = tiny.example_inputs(model)
    switchgear.accelerate(model)
    before = state_of(model)
    with switchgear.RoutingTrace(model) as trace, torch.no_grad():
        logits = model(**inputs).logits
    selection = finetune.select_experts(trace, 0.3)
    trained = finetune.freeze_except(model, selection)
    torch.testing.assert_close(model(**inputs).logits, logits)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).logits.square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in trained)
    changed = False
    for name, tensor in model.state_dict().items():
        layer = next((layer for layer in selection if name.startswith(layer + ".")), None)
        others = [e for e in range(len(tensor)) if layer is not None and e not in selection[layer]]
        assert torch.equal(tensor[others], before[name][others]) if layer else torch.equal(tensor, before[name]), name
        changed = changed or not torch.equal(tensor, before[name])
    assert changed
    after = model(**inputs).logits
    finetune.unfreeze(model)
    torch.testing.assert_close(model(**inputs).logits, after)


def test_other_implementations_of_selected_experts_are_refused() -> None:
    tiny = pytest.importorskip("tiny_models", reason="transformers is not installed")
    from switchgear.integrations.transformers import undo_accelerate

    model = tiny.build("mixtral")
    inputs = tiny.example_inputs(model)
    replaced = switchgear.accelerate(model)
    trained = finetune.freeze_except(model, {"model.layers.0.mlp": [0, 1]}, also=["model.layers.1.mlp.gate"])
    with torch.no_grad():
        trained[0].add_(1)
        logits = model(**inputs).logits
    switchgear.adapters.add_lora(model.model.layers[1], 2)
    switchgear.adapters.remove_lora(model)
    undo_accelerate(replaced)
    message = "MixtralExperts"
    with raises(RuntimeError, message):
        model(**inputs)
    switchgear.accelerate(model)
    torch.testing.assert_close(model(**inputs).logits, logits, rtol=0, atol=0)
    model.set_experts_implementation("eager")
    with raises(RuntimeError, message):
        model(**inputs)
    finetune.unfreeze(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, logits)
