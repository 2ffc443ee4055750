# SPDX-License-Identifier: BSD-3-Clause
"""Experts in each form: results, gradients, state dicts, copies, dtypes, ties, and all or nothing."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from form_cases import FORM_CASES, FormCase, distance, exact_forms, forms, forms_and_dtypes, make_experts
from torch import nn
from torch.nn.utils import parametrize

import switchgear
from errors import raises
from switchgear.adapters import add_lora
from switchgear.reference import formats
from switchgear.weights import Fp8, Int4, Int8, Mxfp4, Weight, encode, stored_of
from switchgear.weights.form import Form
from switchgear.weights.gguf import GgufForm
from switchgear.weights.store import FORMS

KINDS: tuple[dict[str, Any], ...] = (
    {}, {"bias": True}, {"gated": False}, {"interleaved": True}, {"transposed": True, "bias": True},
)  # fmt: skip


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    """There is no warning if a form has kernels."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="switchgear has no kernels")
        yield


def in_rows(case: FormCase, experts: switchgear.Experts, **options: Any) -> switchgear.Experts:
    """The same experts with contiguous weight rows, the layout after a restore."""
    twin = case.experts(**options | {"transposed": False})
    for name, weight in twin.named_parameters():
        same = getattr(experts, name)
        weight.data.copy_(same.mT if options.get("transposed") and same.ndim == 3 else same)
    return twin


# ---- results ---------------------------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(options) or "default")
def test_experts(backend: str, case: FormCase, options: dict[str, Any]) -> None:
    check_experts(backend, case, **options)


@forms_and_dtypes
def test_dtypes(backend: str, case: FormCase, dtype: torch.dtype) -> None:
    check_experts(backend, case, dtype=dtype)


def check_experts(backend: str, case: FormCase, **options: Any) -> None:
    if backend.startswith(("simt", "cuda")) and case.is_exact:
        pytest.skip(f"{case} is for the CPU")
    experts = case.experts(**options)
    stored = case.stored(experts)
    assert stored_of(stored) is not None
    assert str(case.form) in repr(stored)
    assert [name for name, _ in stored.named_parameters()] == [n for n, _ in experts.named_parameters() if "bias" in n]
    # Our kernels' sums do not depend on the layout of weights. The reference uses torch's products, whose sums do.
    plain = in_rows(case, experts, **options) if backend == "reference" else experts
    for num_tokens in (0, 1, 20):
        call = case.inputs(num_tokens, experts.down_proj.dtype)
        with torch.no_grad():
            y, wanted = stored(*call), plain(*call)
            shaped = call[0].unsqueeze(1), call[1].unsqueeze(1), call[2].unsqueeze(1)
            assert torch.equal(stored(*shaped), y.unsqueeze(1))
        if case.is_exact:
            assert torch.equal(y, wanted)
        else:
            assert distance(y, wanted) < case.error
    before = dict(experts.named_parameters())
    assert switchgear.restore(stored) == 1
    assert switchgear.restore(stored) == 0
    assert stored_of(stored) is None
    assert [name for name, _ in stored.named_parameters()] == list(before)
    for name, weight in stored.named_parameters():
        assert weight.dtype is before[name].dtype
        assert weight.is_contiguous()
        assert torch.equal(weight, before[name]) or (not case.is_exact and weight.ndim == 3)
        assert distance(weight.detach(), before[name].detach()) <= case.error
    assert not stored._non_persistent_buffers_set
    assert not list(stored.buffers())


@exact_forms
def test_infinities_and_nan(isa: str, case: FormCase) -> None:
    for dtype in case.dtypes:
        experts = case.experts(dtype=dtype)
        with torch.no_grad():
            experts.gate_up_proj[0, 0, 0], experts.gate_up_proj[1, 3, 5] = float("inf"), float("nan")
            call = case.inputs(40, dtype)
            y, got = experts(*call), case.stored(experts)(*call)
        assert y.isnan().any()
        assert torch.equal(got.isnan(), y.isnan())
        assert torch.equal(got.nan_to_num(), y.nan_to_num())


@forms
def test_autocast(case: FormCase) -> None:
    x, ids, weights = case.inputs(5, torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        experts = case.experts(dtype=dtype, bias=True)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y, wanted = case.stored(experts)(x, ids, weights), experts(x, ids, weights)
        assert y.dtype is torch.bfloat16
        assert torch.equal(y, wanted) if case.is_exact else distance(y, wanted) < case.error
    stored = case.stored(experts)
    if case.is_exact:
        with raises(TypeError, "gate_up_proj"):
            stored(x.bfloat16(), ids, weights)
    else:  # x may have any dtype
        with torch.no_grad():
            assert distance(stored(x.bfloat16(), ids, weights), experts(x, ids, weights)) < case.error


@forms
def test_biases_are_floating(case: FormCase) -> None:
    stored = case.stored(case.experts(bias=True))
    bias = torch.ones_like(stored.down_proj_bias, dtype=torch.int32)
    stored.down_proj_bias = torch.nn.Parameter(bias, requires_grad=False)
    with torch.no_grad(), raises(TypeError, "down_bias"):
        stored(*case.inputs(5))


@forms
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.some(5)
def test_compiled(case: FormCase, backend: str) -> None:
    stored = case.stored(case.experts(bias=True))
    call = case.inputs(7)
    with torch.no_grad():
        torch.compiler.reset()  # there is a limit on graphs per function and process
        compiled = torch.compile(stored, fullgraph=True, backend=backend)
        y = compiled(*call)  # before any other call
        assert torch.equal(stored(*call), y)
        stored.load_state_dict(case.stored(case.experts(bias=True)).state_dict())  # other buffers
        assert torch.equal(compiled(*call), stored(*call))


@forms
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced(case: FormCase) -> None:
    stored = case.stored(case.experts(bias=True))
    with torch.no_grad():
        traced = torch.jit.trace(stored, case.inputs(7), check_trace=False)  # before any other call
        call = case.inputs(4)
        assert torch.equal(traced(*call), stored(*call))


@forms
def test_grouped_gemm(backend: str, case: FormCase) -> None:
    """The product only, forward and backward, against the plain weight that the form represents."""
    if backend.startswith(("simt", "cuda")) and case.is_exact:
        pytest.skip(f"{case} is for the CPU")
    weight = torch.randn(E_OF_GEMM, 256, case.hidden_size) / 16
    stored = encode(weight, case.form, parts=2)
    plan = switchgear.plan(torch.randint(E_OF_GEMM, (9, 2)), E_OF_GEMM)
    x, bias = torch.randn(9, case.hidden_size), torch.randn(E_OF_GEMM, 256)
    results = []
    for w in (stored, stored.plain()):
        leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        out = switchgear.grouped_gemm(
            leaves[0], w, plan.expert_offsets, bias=leaves[1], token_indices=plan.token_indices
        )
        with torch.no_grad():
            assert torch.equal(
                switchgear.grouped_gemm(x, w, plan.expert_offsets, bias=bias, token_indices=plan.token_indices), out
            )
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for got, wanted in zip(*results, strict=True):
        assert distance(got, wanted) < (0.03 if isinstance(case.form, (Int4, Int8, GgufForm)) else 1e-5)


E_OF_GEMM = 3


# ---- gradients -------------------------------------------------------------------------------------------------------


@forms
def test_gradients_reach_what_is_not_frozen(case: FormCase) -> None:
    """They equal those of the plain weights that the form represents, up to the rounding of activations."""
    experts = case.experts(bias=True, dtype=torch.float32)
    stored = case.stored(experts)
    restored = copy.deepcopy(stored)
    switchgear.restore(restored)
    results = []
    for module in (restored, stored):
        torch.manual_seed(0)
        x, ids, weights = case.inputs(9, torch.float32)
        leaves = [x.requires_grad_(), weights.requires_grad_(), module.gate_up_proj_bias, module.down_proj_bias]
        results.append(torch.autograd.grad(module(x, ids, weights).square().sum(), leaves))
    for wanted, got in zip(*results, strict=True):
        assert torch.equal(got, wanted) if case.is_exact else distance(got, wanted) < 0.05


@forms
@pytest.mark.parametrize("order", ["adapters first", "stored first"])
def test_with_adapters(case: FormCase, order: str) -> None:
    """The adapters train; the projections are frozen before and after."""
    experts = case.experts(bias=True, dtype=torch.float32)
    x, ids, weights = case.inputs(9, torch.float32)
    if order == "adapters first":
        adapters = add_lora(experts, 4, alpha=8)
        y = case.stored(experts)(x, ids, weights).detach()
        switchgear.store(experts, case.form)
    else:
        switchgear.store(experts, case.form)
        with torch.no_grad():
            y = experts(x, ids, weights)
        adapters = add_lora(experts, 4, alpha=8)
    torch.testing.assert_close(experts(x, ids, weights), y, rtol=1e-3, atol=1e-4)  # B is zero
    optimizer, losses, target = torch.optim.Adam(adapters, 0.02), [], torch.randn(9, case.hidden_size)
    for _ in range(25):
        loss = (experts(x, ids, weights) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    twin = copy.deepcopy(experts)
    twin.load_state_dict(experts.state_dict())
    with torch.no_grad():
        assert torch.equal(twin(x, ids, weights), experts(x, ids, weights))
    switchgear.restore(experts)
    assert not experts.down_proj.requires_grad


# ---- state dicts and copies ------------------------------------------------------------------------------------------

KEYS = {
    "panels": {""},
    "compact": {""},
    "int8": {"_values", "_scales", "_row_scales"},
    "int4": {"_values", "_scales", "_row_scales"},
    "fp8": {"", "_scale_inv"},
    "mxfp4": {"_blocks", "_scales"},
    "nf4": {"_codes", "_absmax"},
    "nvfp4": {"_packed", "_scale", "_scale_2"},
    "q5_1": {"_bytes"},
    "q4_k": {"_bytes"},
    "q6_k": {"_bytes"},
    "groups": {"_values", "_bits", "_scales"},
}


def same_results(case: FormCase, modules: list[nn.Module], dtype: torch.dtype = torch.bfloat16) -> None:
    call = case.inputs(4, dtype)
    with torch.no_grad():
        y = modules[0](*call)
        assert all(torch.equal(module(*call), y) for module in modules[1:])


@forms
def test_state_dict(case: FormCase, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    experts = case.experts(bias=True, transposed=True)
    model = nn.Sequential(case.stored(experts))
    state = model.state_dict()
    keys = KEYS[case.form.name] | (set() if getattr(case.form, "symmetric", True) else {"_zeros"})
    names = {f"0.{name}{key}" for name in ("gate_up_proj", "down_proj") for key in keys}
    assert set(state) == names | {"0.gate_up_proj_bias", "0.down_proj_bias"}
    if case.is_exact:
        assert all(torch.equal(state[f"0.{name}"], weight) for name, weight in experts.state_dict().items())

    torch.save(state, tmp_path / "state.pt")
    safetensors.save_file(state, tmp_path / "state.safetensors")
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    plain = nn.Sequential(experts).state_dict()
    loaded = torch.load(tmp_path / "state.pt"), safetensors.load_file(tmp_path / "state.safetensors")
    for from_file in (*loaded, plain):  # a plain checkpoint is encoded on load
        other = nn.Sequential(case.stored(case.experts(bias=True, transposed=True)))
        other.load_state_dict(from_file)
        same_results(case, [model[0], other[0]])
    other = nn.Sequential(case.stored(case.experts(bias=True, transposed=True)))
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    same_results(case, [model[0], other[0]])


@forms
def test_copies(case: FormCase, tmp_path: Path) -> None:
    stored = case.stored(case.experts(bias=True))
    torch.save(stored, tmp_path / "module.pt")
    copies: list[nn.Module] = [
        copy.deepcopy(stored),
        copy.copy(stored),
        pickle.loads(pickle.dumps(stored)),
        torch.load(tmp_path / "module.pt", weights_only=False),
        stored.to("cpu"),
    ]
    same_results(case, [stored, *copies])
    for module in copies[:1] + copies[2:4]:  # the others share buffers
        assert switchgear.restore(module) == 1
    same_results(case, [stored, *copies[1:2]])
    stored(*case.inputs(2))  # copies do not include a cached weight
    assert len(pickle.dumps(stored)) < 1.1 * sum(b.nbytes for b in stored.buffers()) + 100_000


@forms
def test_other_buffers(case: FormCase) -> None:
    """State that a module caches follows its buffers: replaced for a call, or written to in a copy."""
    stored, other = case.stored(case.experts()), case.stored(case.experts())
    call = case.inputs(4)
    with torch.no_grad():
        y, wanted = stored(*call), other(*call)
        if case.form.name != "compact":  # compact headers have different lengths
            assert torch.equal(torch.func.functional_call(stored, dict(other.named_buffers()), call), wanted)
        assert torch.equal(stored(*call), y)
        for copied in (copy.deepcopy(stored), pickle.loads(pickle.dumps(stored))):
            buffers = dict(copied.named_buffers())
            for buffer in [buffers[name] for name in buffers if "scales" in name] or buffers.values():
                buffer.zero_()
            assert not copied(*call).any() or case.is_exact
        assert torch.equal(stored(*call), y)


@forms
@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double])
def test_change_of_dtype(case: FormCase, change: Callable[[nn.Module], nn.Module]) -> None:
    """Stored data does not change, bit for bit. With x of another dtype a call works, or the error names the dtype."""
    experts = case.experts(dtype=torch.float32)
    stored = case.stored(experts)
    buffers = {name: buffer.clone() for name, buffer in stored.named_buffers()}
    change(stored)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in stored.named_buffers())
    x, ids, weights = case.inputs(3, torch.float32)
    with torch.no_grad():
        assert distance(stored(x, ids, weights), experts(x, ids, weights)) <= case.error
        change(x_holder := nn.ParameterList([x]))
        x = x_holder[0].detach()
        if case.is_exact and x.dtype is not torch.float32:
            with raises(TypeError):
                stored(x, ids, weights)
        else:
            assert distance(stored(x, ids, weights.to(x.dtype)), experts(x.float(), ids, weights)) <= case.error + 1e-3


@pytest.mark.parametrize("case", [case for case in FORM_CASES if case.form.name != "compact"], ids=str)
def test_another_device(case: FormCase) -> None:
    """meta tensors have shapes but no data, and no kernels, so panels and GGUF's types warn. (The layout of compact
    rows is read from the rows.)"""
    stored = case.stored(case.experts(bias=True)).to("meta")
    x, ids, weights = (tensor.to("meta") for tensor in case.inputs(3))
    switchgear.backends._warned_about.clear()
    match = f"{case.form.name} weights on meta: each call expands them"
    with pytest.warns(RuntimeWarning, match=match) if case.form.name not in formats.ON_CUDA else nullcontext():
        assert stored(x, ids, weights).shape == x.shape


@forms
def test_bad_state_dicts(case: FormCase) -> None:
    experts = case.experts(transposed=True)
    stored = nn.Sequential(case.stored(experts))
    before = nn.Sequential(copy.deepcopy(stored[0]))
    state = {f"0.{name}": weight + 1 for name, weight in experts.state_dict().items()}

    with raises(ValueError):
        stored.load_state_dict(state | {"0.down_proj": state["0.down_proj"][:, :-1]})
    same_results(case, [before[0], stored[0]])  # the other projection was not loaded
    with raises(ValueError):
        stored.load_state_dict(state | {"0.gate_up_proj": state["0.gate_up_proj"][:, :-1]}, strict=False)
    with raises(ValueError):
        stored.load_state_dict(state | {"0.down_proj": state["0.down_proj"].to(torch.int8)})
    own = before.state_dict()
    last = f"0.down_proj{case.form.suffixes[-1] if case.form.suffixes else ''}"
    if case.form.suffixes:
        with raises(ValueError, last):
            stored.load_state_dict(own | {last: own[last][..., :-1]})
    same_results(case, [before[0], stored[0]])
    partial = {key: tensor for key, tensor in own.items() if key != last}
    with raises(RuntimeError):
        stored.load_state_dict(partial)
    with raises(RuntimeError):
        stored.load_state_dict({"0.gate_up_proj": state["0.gate_up_proj"]})
    if case.form.suffixes:
        with raises(RuntimeError):
            nn.Sequential(case.experts(transposed=True)).load_state_dict(own)
        plain = nn.Sequential(case.experts(transposed=True))
        plain.load_state_dict(own | plain.state_dict(), strict=False)  # lacks nothing
    stored.load_state_dict({"0.gate_up_proj": state["0.gate_up_proj"]}, strict=False)
    with torch.no_grad():
        experts.gate_up_proj += 1
    same_results(case, [case.stored(experts), stored[0]])


def test_adapters_in_a_state_dict_are_no_stored_weights() -> None:
    model = nn.Sequential(make_experts(32, 16))
    add_lora(model, 2)
    with raises(RuntimeError) as error:
        nn.Sequential(make_experts(32, 16)).load_state_dict(model.state_dict())
    assert "stored" not in str(error.value)


@forms
@pytest.mark.parametrize("part", ["", "1"])
@pytest.mark.some(13)
def test_a_refused_state_dict_changes_nothing(case: FormCase, part: str) -> None:
    """Neither other modules nor other experts, also where a part of a model is loaded, and of a copy."""

    def made() -> nn.Module:
        experts = [case.experts() for _ in range(2)]
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), *experts))

    model = made()
    switchgear.store(model, case.form)
    state = made().get_submodule(part).state_dict()
    last = [name for name in state if name.endswith("down_proj")][-1]
    bad = state | {last: state[last][..., :-1]}
    for stored in (model, copy.deepcopy(model)):
        before = {name: tensor.clone().view(torch.uint8) for name, tensor in stored.state_dict().items()}
        with raises(ValueError, last):
            stored.get_submodule(part).load_state_dict(bad)
        after = stored.state_dict()
        assert all(torch.equal(after[name].view(torch.uint8), bits) for name, bits in before.items())
        stored.get_submodule(part).load_state_dict(state)
    switchgear.restore(model)
    with raises(RuntimeError):
        model.get_submodule(part).load_state_dict(bad)


def test_what_cannot_be_encoded_changes_nothing_and_nothing_is_encoded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 4), *(switchgear.Experts(64, 32, 2) for _ in range(2)))

    model, state = made(), made().state_dict()
    compiled = torch.compile(model)
    for _ in range(2):
        switchgear.store(compiled, "int8")
        switchgear.restore(compiled)
    switchgear.store(compiled, "int8")
    bad = {**state, "2.down_proj": state["2.down_proj"].clone().index_fill_(0, torch.tensor(1), torch.nan)}
    for top in (compiled, model):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        prefix = "_orig_mod." if top is compiled else ""
        with raises(ValueError):
            top.load_state_dict({prefix + name: tensor for name, tensor in bad.items()})
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    encoded: list[str] = []
    real = Int8.encode

    def counted(form: Int8, name: str, *rest: Any) -> Any:
        encoded.append(name)
        return real(form, name, *rest)

    monkeypatch.setattr(Int8, "encode", counted)
    model.load_state_dict(state)
    assert sorted(encoded) == ["1.down_proj", "1.gate_up_proj", "2.down_proj", "2.gate_up_proj"]


@forms
@pytest.mark.parametrize("made", [False, True])
def test_inference_mode(case: FormCase, made: bool) -> None:
    """Weights stored, encoded, loaded or restored in inference mode can be used in later backward passes."""
    with torch.inference_mode(made):
        experts = case.experts()
    with torch.inference_mode():
        stored, loaded, restored = case.stored(experts), case.stored(case.experts()), case.stored(experts)
        loaded.load_state_dict(stored.state_dict())
        switchgear.restore(restored)
        weights = [
            encode(weight, case.form, parts=parts)
            for weight, parts in ((experts.gate_up_proj, 2), (experts.down_proj, 1))
        ]
        stored(*case.inputs(2))  # what a call keeps
    x, ids, topk_weights = case.inputs(3)
    x.requires_grad_()
    results = [module(x, ids, topk_weights) for module in (stored, loaded, restored)]
    results.append(switchgear.moe(x, *weights, ids, topk_weights))
    grads = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in results]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[3])
    assert bool(grads[2].any())


# ---- all or nothing --------------------------------------------------------------------------------------------------


def model_of(case: FormCase, count: int = 3) -> nn.ModuleList:
    return nn.ModuleList(case.experts() for _ in range(count))


def is_untouched(model: nn.Module, before: dict[str, nn.Parameter]) -> bool:
    now = dict(model.named_parameters())
    return list(now) == list(before) and all(now[name] is before[name] for name in now) and not list(model.buffers())


@forms
def test_report(case: FormCase) -> None:
    model = model_of(case)
    report = switchgear.store(model, case.form)
    assert (report.form, report.modules, report.lossless) == (case.form, 3, case.is_exact)
    assert report.bytes_before == 3 * (3 * 5 * case.hidden_size * case.intermediate_size * 2)
    assert report.bytes_after == sum(buffer.nbytes for buffer in model.buffers())
    assert str(report).startswith(f"3 modules of experts as {case.form}: ")
    assert switchgear.store(model, case.form) == report  # again, without effect
    assert switchgear.restore(model) == 3


def rounding_warnings(model: nn.Module) -> list[str]:
    """Those of `restore`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        switchgear.restore(model)
    return [str(w.message) for w in caught if w.category is RuntimeWarning and w.filename == __file__]


@forms
def test_restore_of_rounded_weights_warns(case: FormCase) -> None:
    model = model_of(case)
    switchgear.store(model, case.form)
    found = rounding_warnings(model)
    assert len(found) == (not case.is_exact)
    assert all(str(case.form) in message for message in found)


def test_a_warning_as_an_error_changes_nothing() -> None:
    model = model_of(FORM_CASES[2])
    switchgear.store(model, "int8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with raises(RuntimeWarning, "restore"):
            switchgear.restore(model)
    assert all(stored_of(module) is not None for module in model)


@forms
@pytest.mark.some(8)
def test_kept_parameters_return(case: FormCase) -> None:
    """The objects themselves, after any number of forms, with their memory in the report."""
    model = model_of(case)
    model[2].requires_grad_(False)
    before = dict(model.named_parameters())
    bits = {name: parameter.detach().clone() for name, parameter in before.items()}
    trained = {name: parameter.requires_grad for name, parameter in before.items()}
    for form in (case.form, "int8", case.form):
        report = switchgear.store(model, form, keep_plain=True)
        assert not [name for name, _ in model.named_parameters() if name.endswith("proj")]
        assert report.bytes_after == report.bytes_before + sum(buffer.nbytes for buffer in model.buffers())
        assert switchgear.store(model, form) == report
        copied = copy.deepcopy(model)
        assert rounding_warnings(model) == []
        after = dict(model.named_parameters())
        assert list(after) == list(before)
        assert all(after[name] is parameter for name, parameter in before.items())
        assert {name: parameter.requires_grad for name, parameter in after.items()} == trained
        assert rounding_warnings(copied) == []
        assert all(torch.equal(parameter, bits[name]) for name, parameter in copied.named_parameters())


@forms
@pytest.mark.some(8)
@pytest.mark.parametrize("as_stored", [False, True])
def test_a_state_dict_is_loaded_into_kept_parameters(case: FormCase, as_stored: bool) -> None:
    """Those that share memory without being one, too."""
    model = model_of(case)
    model[1].down_proj.data = model[0].down_proj.data
    model[2].down_proj = model[0].down_proj
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in (*other[0].parameters(), *other[1].parameters()):
            parameter.neg_()
        other[1].down_proj.copy_(other[0].down_proj)
    plain = {name: parameter.detach().clone() for name, parameter in other.named_parameters(remove_duplicate=False)}
    if as_stored:
        switchgear.store(other, case.form)
    switchgear.store(model, case.form, keep_plain=True)
    model.load_state_dict(other.state_dict())
    if as_stored:
        rounding_warnings(other)
        plain = dict(other.named_parameters(remove_duplicate=False))
    assert rounding_warnings(model) == []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert torch.equal(parameter, plain[name]), name


def test_keep_plain_with_low_memory() -> None:
    model = model_of(FORM_CASES[2])
    before = dict(model.named_parameters())
    with raises(ValueError, "keep_plain"):
        switchgear.store(model, "int8", low_memory=True, keep_plain=True)
    assert is_untouched(model, before)
    with raises(TypeError, "keep_plain"):
        switchgear.store(model, "int8", keep_plain="yes")


class Failing:
    """A form whose encode fails from the n-th call on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, form: Form, calls: int, error: BaseException) -> None:
        encode_one, self.count = type(form).encode, 0

        def encode(*args: Any) -> Weight | str:
            self.count += 1
            if self.count > calls:
                raise error
            return encode_one(*args)

        monkeypatch.setattr(type(form), "encode", encode)


@forms
@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), ValueError("numbers")], ids=repr)
def test_nothing_changes_where_one_module_fails(
    case: FormCase, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(case)
    before = dict(model.named_parameters())
    Failing(monkeypatch, case.form, 5, error)
    with pytest.raises(type(error)):
        switchgear.store(model, case.form)
    assert is_untouched(model, before)


@forms
def test_low_memory(case: FormCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer gives the same result. A failure is undone if the form is exact, else reported by name."""
    model = model_of(case)
    wanted = copy.deepcopy(model)
    switchgear.store(wanted, case.form)
    one_by_one = copy.deepcopy(model)
    assert switchgear.store(one_by_one, case.form, low_memory=True).modules == 3
    same_results(case, [wanted[1], one_by_one[1]])

    state = copy.deepcopy(model.state_dict())
    Failing(monkeypatch, case.form, 5, MemoryError())
    if case.is_exact:
        with pytest.raises(MemoryError):
            switchgear.store(model, case.form, low_memory=True)
        assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    else:
        with raises(RuntimeError, "model"):
            switchgear.store(model, case.form, low_memory=True)
        assert [stored_of(module) is not None for module in model] == [True, True, False]
        switchgear.restore(model)
    assert list(model.state_dict()) == list(state)


@forms
def test_a_failing_commit_is_undone(case: FormCase, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(case)
    before = dict(model.named_parameters())
    register, calls = nn.Module.register_buffer, []

    def fail_at_last(module: nn.Module, name: str, *args: Any, **options: Any) -> None:
        calls.append(name)
        if module is model[2] and name.startswith("down_proj"):
            raise MemoryError
        register(module, name, *args, **options)

    monkeypatch.setattr(nn.Module, "register_buffer", fail_at_last)
    with pytest.raises(MemoryError):
        switchgear.store(model, case.form)
    assert is_untouched(model, before)
    assert all(stored_of(module) is None for module in model)
    monkeypatch.undo()
    assert switchgear.store(model, case.form).modules == 3


@forms
@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.some(13)
def test_restore_changes_nothing_where_it_fails(
    case: FormCase, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(case)
    switchgear.store(model, case.form)
    buffers = dict(model.named_buffers())
    decode, calls = Weight.plain, []

    def fail_in_the_third_module(weight: Weight) -> Any:
        calls.append(weight)
        if len(calls) == 5:
            raise error
        return decode(weight)

    monkeypatch.setattr(Weight, "plain", fail_in_the_third_module)
    with pytest.raises(type(error)):
        switchgear.restore(model)
    assert not list(model.named_parameters())
    assert all(buffers[name] is buffer for name, buffer in model.named_buffers())
    assert all(stored_of(module) is not None for module in model)
    assert switchgear.restore(model) == 3


@forms
def test_a_later_module_in_another_form(case: FormCase) -> None:
    """The first modules could be stored, the last one is already, in another form."""
    model = model_of(case)
    other = next(c.form for c in FORM_CASES if c.form != case.form and c.hidden_size == case.hidden_size)
    switchgear.store(model[2], other)
    before = dict(model.named_parameters())
    with raises(ValueError):
        switchgear.store(model, case.form)
    now = dict(model.named_parameters())
    assert now.keys() == before.keys()
    assert all(now[name] is before[name] for name in before)
    assert [stored_of(module) is None for module in model] == [True, True, False]


@forms
@pytest.mark.some(6)
def test_ties(case: FormCase) -> None:
    """One parameter in two modules, and two in the same memory, are stored once, and tied again after `restore`."""
    first, second, third = model = model_of(case)
    second.down_proj = first.down_proj
    third.down_proj.data = first.down_proj.data
    size = first.gate_up_proj.nbytes + first.down_proj.nbytes
    for ties in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        report = switchgear.store(ties, case.form)
        assert report.bytes_before < 3 * size
        if ties is model:
            shared = [stored_of(module).weights(module)[1].data.data_ptr() for module in ties]  # type: ignore[union-attr]
            assert len(set(shared)) == 1
        assert switchgear.restore(ties) == 3
        assert ties[1].down_proj is ties[0].down_proj
    assert third.down_proj is not first.down_proj
    assert third.down_proj.data_ptr() == first.down_proj.data_ptr()
    assert first.gate_up_proj.data_ptr() != second.gate_up_proj.data_ptr()


@forms
def test_ties_stay_when_a_state_dict_is_loaded(case: FormCase) -> None:
    """Plain weights and those of the form. What is loaded into one module is in the other one, as with parameters."""
    first, second = model = nn.ModuleList(case.experts() for _ in range(2))
    second.down_proj = first.down_proj
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].down_proj.neg_()
    plain = other.state_dict()
    for each in (model, other):
        switchgear.store(each, case.form)
    wanted = stored_of(other[0]).weights(other[0])[1].plain()  # type: ignore[union-attr]
    for state in (plain, other.state_dict()):
        model.load_state_dict({key: tensor for key, tensor in state.items() if key.startswith("0.")}, strict=False)
        weights = [stored_of(module).weights(module)[1] for module in model]  # type: ignore[union-attr]
        assert [a.data_ptr() for a in weights[0].tensors] == [b.data_ptr() for b in weights[1].tensors]
        assert torch.equal(weights[1].plain(), wanted)
    assert switchgear.restore(model) == 2
    assert model[1].down_proj is model[0].down_proj


# ---- errors ----------------------------------------------------------------------------------------------------------


@forms
def test_errors(case: FormCase) -> None:
    form = case.form
    for model in (
        nn.Linear(2, 2),
        case.experts(device="meta"),
    ):
        with raises(ValueError, "model"):
            switchgear.store(model, form)
        assert switchgear.restore(model) == 0
    for name in ("gate_up_proj", "down_proj"):
        computed = case.experts()
        parametrize.register_parametrization(computed, name, nn.Identity())
        before = dict(computed.named_parameters())
        with raises(ValueError):
            switchgear.store(computed, form)
        assert is_untouched(computed, before)
    if not case.is_exact:
        for value in (float("nan"), float("-inf")):
            broken = model_of(case)
            with torch.no_grad():
                broken[1].down_proj[0, 0, 0] = value
            before = dict(broken.named_parameters())
            with raises(ValueError):
                switchgear.store(broken, form)
            assert is_untouched(broken, before)
    else:
        mixed = case.experts()
        mixed.down_proj = nn.Parameter(mixed.down_proj.float())
        with raises(ValueError):
            switchgear.store(mixed, form)
    stored = nn.Sequential(case.stored(case.experts()))
    for other in FORM_CASES:
        if other.form != form:
            message = "model.0"
            with raises(ValueError, message):
                switchgear.store(stored, other.form)
    x, ids, weights = case.inputs(3)
    with raises(ValueError, "x"):
        stored[0](x[:, :-1], ids, weights)
    with raises(ValueError, "topk_ids"):
        stored[0](x, ids + 5, weights)


def test_forms_by_name() -> None:
    experts = make_experts(128, 64)
    with raises(ValueError, "form"):
        switchgear.store(experts, "int3")
    with raises(ValueError, "group"):
        switchgear.store(experts, "int4", group=3)
    with raises(ValueError, "group_size"):
        switchgear.store(experts, Int8(), group_size=32)
    with raises(ValueError, "block"):
        switchgear.store(experts, "fp8", block="64x64")
    with raises(ValueError, "block"):
        switchgear.store(experts, "fp8", block=[128, 128])
    with raises(ValueError, "weight"):
        encode(torch.randn(2, 8, 8), "compact")
    assert str(Int4(group_size=64, symmetric=False)) == "int4(group_size=64, symmetric=False)"
    assert [str(form) for form in (Int4(), Fp8(), Mxfp4())] == ["int4", "fp8", "mxfp4"]
    assert switchgear.store(experts, "int4", group_size=64).form == Int4(64)


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize(
    ("weight", "parts", "argument"),
    [
        ([[[1.0]]], 1, "weight"),
        (torch.ones(2, 64, 64, dtype=torch.int32), 1, "weight"),
        (torch.ones(2, 64, 64, dtype=torch.complex64), 1, "weight"),
        (torch.ones(2, 64, 64).to_sparse(), 1, "weight"),
        (torch.ones(64, 64), 1, "weight"),
        (torch.ones(0, 64, 64), 1, "weight"),
        (torch.ones(2, 64, 0), 1, "weight"),
        (torch.ones(2, 64, 64, device="meta"), 1, "weight"),
        (torch.ones(2, 64, 64), 0, "parts"),
        (torch.ones(2, 66, 64), 3, "parts"),
        (torch.ones(2, 65, 64), 2, "parts"),
        (torch.ones(2, 64, 64), "2", "parts"),
        (torch.ones(2, 64, 64), True, "parts"),
    ],
)  # fmt: skip
def test_what_is_no_weight(form: str, weight: Any, parts: Any, argument: str) -> None:
    with raises((TypeError, ValueError), argument):
        encode(weight, form, parts=parts)


# ---- models ----------------------------------------------------------------------------------------------------------


def model_named(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=512, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_local_experts=4, max_position_embeddings=64, pad_token_id=0,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForCausalLM")(config).to(torch.bfloat16).eval().requires_grad_(False)


@forms
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])  # the latter's are transposed, interleaved and have biases
@pytest.mark.some(8)
def test_a_model_of_transformers(case: FormCase, name: str, tmp_path: Path) -> None:
    model = model_named(name)
    switchgear.accelerate(model)
    prompt = torch.arange(1, 9)[None]
    logits, before = model(prompt).logits, {key: w.clone() for key, w in model.state_dict().items()}
    text = model.generate(prompt, max_new_tokens=6, do_sample=False)
    if name == "GptOss":
        switchgear.store(model, "plain")
    assert switchgear.store(model, case.form).modules == 2
    got = model(prompt).logits
    if not case.is_exact:
        assert distance(got, logits) < 2 * case.error
        twin = type(model)(model.config).to(torch.bfloat16).eval()
        switchgear.accelerate(twin)
        switchgear.store(twin, case.form)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(prompt).logits, got)
        assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape == (1, 12)
        model.model.embed_tokens.requires_grad_(True)
        model(prompt).logits.float().square().mean().backward()
        assert model.model.embed_tokens.weight.grad.any()
        assert switchgear.restore(model) == 2
        assert distance(model(prompt).logits, logits) < 2 * case.error
        return
    assert torch.equal(got, logits)
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), text)
    assert all(torch.equal(w, before[key]) for key, w in model.state_dict().items())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], w) for key, w in before.items())
    assert switchgear.restore(model) == 2
    assert torch.equal(model(prompt).logits, logits)
