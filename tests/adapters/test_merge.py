# SPDX-License-Identifier: BSD-3-Clause
"""merge and unmerge: values, bits, memory and refusals."""

import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import switchgear
from errors import raises
from switchgear.adapters import LoRAExperts, add_lora, add_lora_experts, lora_of, merge, remove_lora, unmerge
from switchgear.weights.adapted import adapters_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def layer(dtype: torch.dtype = torch.float32, std: float = 0.3, **options: Any) -> switchgear.Experts:
    torch.manual_seed(0)
    experts = switchgear.Experts(48, 32, 3, dtype=dtype, **options)
    for parameter in add_lora(experts, 5, alpha=7):
        nn.init.normal_(parameter, std=std)
    return experts


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", [0.01, 0.3, 20.0])  # an adapter far below, near and above the weights
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_bits(dtype: torch.dtype, std: float, transposed: bool) -> None:
    experts = layer(dtype, std, transposed=transposed)
    with torch.no_grad():  # values whose bits are easily lost
        experts.down_proj[0, 0, :4] = torch.tensor([0.0, -0.0, 1e-7, -1e-7])
    before = {name: bits(p) for name, p in experts.named_parameters()}
    wanted = {}
    for name, (a, b, options) in lora_of(experts).items():
        weight = getattr(experts, name).detach().double()
        delta = options.scale * b.detach().double() @ a.detach().double()
        wanted[name] = weight + (delta.mT if transposed else delta)
    assert merge(experts) == 2
    for name, want in wanted.items():
        got = getattr(experts, name).detach().double()
        half_ulp = torch.finfo(dtype).eps / 2 if dtype is not torch.float64 else 2.0**-50
        single = 0.0 if dtype is torch.float64 else 2.0**-24  # of sums of r products in float32
        bound = half_ulp * want.abs() + 8 * single * want.abs().max() + 2.0**-24
        assert ((got - want).abs() <= bound).all()
    assert merge(experts) == 0  # all are merged
    assert unmerge(experts) == 2
    assert all(torch.equal(bits(p), before[name]) for name, p in experts.named_parameters())


def test_merged_adapters_do_not_act_and_do_not_train() -> None:
    experts = layer()
    x, ids, weights = torch.randn(7, 48), torch.randint(3, (7, 1)), torch.rand(7, 1)
    y = experts(x, ids, weights)
    merge(experts)
    torch.testing.assert_close(experts(x, ids, weights), y, rtol=1e-4, atol=1e-5)
    for a, *_ in lora_of(experts).values():
        a.detach().zero_()  # changed after the merge: unmerging uses what was merged
    unmerge(experts)
    assert not torch.equal(experts(x, ids, weights), y)


def test_memory_of_a_merge() -> None:
    experts = layer(torch.float32, 0.01)
    merge(experts)
    for lora in adapters_of(experts).values():
        kept = sum(tensor.nbytes for lost in lora.merged.lost for tensor in lost if tensor is not None)
        weights = experts.gate_up_proj.numel() + experts.down_proj.numel()
        assert kept <= 1.1 * weights  # a byte per weight, a quarter of float32


def test_without_keeping_the_adapters() -> None:
    experts = layer()
    x, ids, weights = torch.randn(7, 48), torch.randint(3, (7, 1)), torch.rand(7, 1)
    y = experts(x, ids, weights)
    assert merge(experts, keep_adapters=False) == 2
    assert lora_of(experts) == {}
    assert set(dict(experts.named_parameters())) == {"gate_up_proj", "down_proj"}
    torch.testing.assert_close(experts(x, ids, weights), y, rtol=1e-4, atol=1e-5)
    experts = layer()
    merge(experts)
    assert merge(experts, keep_adapters=False) == 0
    assert lora_of(experts) == {}


def unchanged(experts: nn.Module, error: type[BaseException], match: str, call: Any = merge) -> None:
    before = {name: bits(p) for name, p in experts.named_parameters()}
    with raises(error, match):
        call(experts)
    assert all(torch.equal(bits(p), before[name]) for name, p in experts.named_parameters())


def test_a_routed_mixture_is_not_merged() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    add_lora_experts(net, 2, 1, targets=["1"])
    unchanged(net, ValueError, "model")
    beside = nn.Sequential(net, layer())
    assert merge(beside) == 2  # those of add_lora; the mixture stays
    assert isinstance(net[1], LoRAExperts)


def test_what_is_refused() -> None:
    plain = switchgear.Experts(48, 32, 3)
    unchanged(plain, ValueError, "model")
    unchanged(layer(), ValueError, "model", unmerge)
    experts = layer()
    with torch.no_grad():
        experts.down_proj_lora_A[2, 0, 0] = float("nan")
    unchanged(experts, ValueError, "model")
    experts = layer(torch.float16)
    with torch.no_grad():
        experts.down_proj_lora_A[1] = 6e4
        experts.down_proj_lora_B[1] = 6e4
    unchanged(experts, ValueError, "model")
    both = nn.ModuleList([layer(), layer()])
    both[1].down_proj = both[0].down_proj
    unchanged(both, ValueError, "model")
    experts = layer()
    merge(experts)
    with torch.no_grad():
        experts.down_proj[0, 0, 0] += 1
    unchanged(experts, ValueError, "model", unmerge)
    converted = layer()
    merge(converted)
    converted.bfloat16()
    unchanged(converted, ValueError, "model", unmerge)
    before = bits(converted.gate_up_proj)
    assert merge(converted, keep_adapters=False) == 0
    assert torch.equal(bits(converted.gate_up_proj), before)
    assert lora_of(converted) == {}
    experts = layer()
    merge(experts)
    with switchgear.use_backend("reference"):
        unchanged(experts, ValueError, "model", unmerge)
    with raises(ValueError):
        remove_lora(experts)


def test_a_failure_halfway_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("switchgear.adapters.merge")
    original, calls = module._find_lost, []

    def run_out(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            raise MemoryError
        return original(*args)

    monkeypatch.setattr(module, "_find_lost", run_out)
    unchanged(layer(), MemoryError, "")


@pytest.mark.parametrize("call", [merge, unmerge])
@pytest.mark.parametrize(("name", "last"), [("_write", 1), ("_write", 5), ("_set_merged", 2)])
@pytest.mark.parametrize("is_done", [False, True])
def test_an_interruption_changes_nothing(
    call: Any, name: str, last: int, is_done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as by Ctrl-C, before or after a step is done. The call works afterwards."""
    experts, wanted = layer(torch.bfloat16), layer(torch.bfloat16)
    for each in (experts, wanted) if call is unmerge else ():
        merge(each)
    call(wanted)
    module, steps = importlib.import_module("switchgear.adapters.merge"), itertools.count(1)
    original = getattr(module, name)

    def interrupted(*args: Any) -> None:
        is_last = next(steps) == last
        if is_done or not is_last:
            original(*args)
        if is_last:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        unchanged(experts, KeyboardInterrupt, "", call)
    call(experts)
    assert all(torch.equal(bits(p), bits(q)) for p, q in zip(experts.parameters(), wanted.parameters(), strict=True))


@pytest.mark.parametrize("is_done", [False, True])
def test_an_interruption_counts_each_adapter_once(is_done: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what unmerging needs, an expert is merged and its B is zero, or nothing of it has changed."""
    experts, plain, merged = layer(torch.bfloat16), layer(torch.bfloat16), layer(torch.bfloat16)
    merge(merged)
    module, steps = importlib.import_module("switchgear.adapters.merge"), itertools.count(1)
    original = module._write

    def interrupted(*args: Any) -> None:
        is_last = next(steps) == 5
        if is_done or not is_last:
            original(*args)
        if is_last:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(experts, keep_adapters=False)
    monkeypatch.undo()
    names = ("gate_up_proj", "down_proj")
    states = [(name, e) for name in names for e in range(experts.num_experts)]
    for number, (name, e) in enumerate(states):
        is_merged = number < 4
        assert torch.equal(getattr(experts, name)[e], getattr(merged if is_merged else plain, name)[e])
        b = getattr(experts, f"{name}_lora_B")[e]
        assert torch.equal(b, torch.zeros_like(b) if is_merged else getattr(plain, f"{name}_lora_B")[e])
    merge(experts, keep_adapters=False)
    assert all(torch.equal(getattr(experts, name), getattr(merged, name)) for name in names)
