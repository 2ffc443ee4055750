# SPDX-License-Identifier: BSD-3-Clause
"""Experts whose weights are stored in another form: modules, state dicts, gradients and models, in each form."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from switchgear.panels import DTYPES
from switchgear.stored import stored_of
from torch import Tensor, nn

import switchgear
from switchgear import compress

H, I, E, K = 512, 384, 5, 2  # noqa: E741


class Form(NamedTuple):
    name: str  # of the option of Experts.pack_
    noun: str  # of messages
    store: Callable[[nn.Module], int]
    restore: Callable[[nn.Module], int]
    dtypes: tuple[torch.dtype, ...]

    def packed(self, experts: switchgear.Experts) -> switchgear.Experts:
        """A copy of experts in this form."""
        return copy.deepcopy(experts).pack_(**{self.name: True})  # type: ignore[arg-type]


FORMS = (
    Form("panels", "weights in panels", switchgear.pack_panels, switchgear.unpack_panels,
         (torch.bfloat16, torch.float32, torch.float16)),
    Form("compact", "compact weights", compress.compact, compress.expand, (torch.bfloat16, torch.float32)),
)  # fmt: skip
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
forms_and_dtypes = pytest.mark.parametrize(
    ("form", "dtype"),
    [pytest.param(form, dtype, id=f"{form.name}-{DTYPES[dtype]}") for form in FORMS for dtype in form.dtypes],
)


def make_experts(**options: Any) -> switchgear.Experts:
    experts = switchgear.Experts(H, I, E, **{"dtype": torch.bfloat16} | options)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    return experts


def in_rows(experts: switchgear.Experts, **options: Any) -> switchgear.Experts:
    """The same experts with weights whose rows are contiguous, as stored ones are restored."""
    twin = make_experts(**options | {"transposed": False})
    for name, weight in twin.named_parameters():
        same = getattr(experts, name)
        weight.data.copy_(same.mT if options.get("transposed") and same.ndim == 3 else same)
    return twin


def inputs(num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.rand(num_tokens, E).argsort(-1)[:, :K].int()
    return torch.randn(num_tokens, H).to(dtype), ids, torch.rand(num_tokens, K)


@forms
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"gated": False}, {"interleaved": True}, {"transposed": True}],
    ids=lambda options: "-".join(options) or "default",
)
def test_experts(backend: str, form: Form, options: dict[str, Any]) -> None:
    check_experts(backend, form, **options)


@forms_and_dtypes
def test_dtypes(backend: str, form: Form, dtype: torch.dtype) -> None:
    check_experts(backend, form, dtype=dtype)


def check_experts(backend: str, form: Form, **options: Any) -> None:
    if backend.startswith(("simt", "cuda")):
        pytest.skip(f"{form.noun} are for the CPU, and weights on other devices stay as they are")
    experts = make_experts(**options)
    packed = form.packed(experts)
    assert stored_of(packed) is not None
    assert form.name in repr(packed)
    assert [name for name, _ in packed.named_parameters()] == [n for n, _ in experts.named_parameters() if "bias" in n]
    # Our kernels sum alike wherever weights lie; the reference as torch's products do, and these by how they lie.
    plain = in_rows(experts, **options) if backend == "reference" else experts
    for num_tokens in (0, 1, 20):
        call = inputs(num_tokens, experts.down_proj.dtype)
        with torch.no_grad():
            assert torch.equal(packed(*call), plain(*call))
        shaped = call[0].view(num_tokens, 1, H), call[1].view(num_tokens, 1, K), call[2].view(num_tokens, 1, K)
        with torch.no_grad():
            assert torch.equal(packed(*shaped), plain(*call).view(num_tokens, 1, H))
    before = dict(experts.named_parameters())
    assert stored_of(packed.unpack_()) is None
    assert [name for name, _ in packed.named_parameters()] == list(before)
    assert all(torch.equal(weight, before[name]) for name, weight in packed.named_parameters())
    assert not packed._non_persistent_buffers_set


@forms_and_dtypes
def test_infinities_and_nan(isa: str, form: Form, dtype: torch.dtype) -> None:
    experts = make_experts(dtype=dtype)
    with torch.no_grad():
        experts.gate_up_proj[0, 0, 0], experts.gate_up_proj[1, 3, 5] = float("inf"), float("nan")
        call = inputs(40, dtype)
        y, got = experts(*call), form.packed(experts)(*call)
    assert y.isnan().any()
    assert torch.equal(got.isnan(), y.isnan())
    assert torch.equal(got.nan_to_num(), y.nan_to_num())


@forms
def test_gradients_reach_activations(form: Form) -> None:
    experts = make_experts(bias=True)
    results = []
    for module in (experts, form.packed(experts)):
        torch.manual_seed(0)
        x, ids, weights = inputs(9)
        leaves = [x.requires_grad_(), weights.requires_grad_(), module.gate_up_proj_bias, module.down_proj_bias]
        results.append(torch.autograd.grad(module(x, ids, weights).square().sum(), leaves))
    assert all(map(torch.equal, *results))


@forms
def test_state_dict_is_plain(form: Form, tmp_path: Path) -> None:
    experts = make_experts(bias=True, transposed=True)
    model = nn.Sequential(copy.deepcopy(experts))
    assert form.store(model) == 1
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    assert sorted(state) == sorted(f"0.{name}" for name in experts.state_dict())
    assert all(torch.equal(state[f"0.{name}"], weight) for name, weight in experts.state_dict().items())

    other = nn.Sequential(make_experts(bias=True, transposed=True))
    assert form.store(other) == 1
    other.load_state_dict(state)
    call = inputs(4)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        y = experts(*call)
        for module in (model, other, *copies):
            assert torch.equal(module[0](*call), y)
    for module in copies:
        assert form.restore(module) == 1


@forms
def test_bad_state_dicts(form: Form) -> None:
    experts = make_experts(transposed=True)
    packed = nn.Sequential(form.packed(experts))
    state = {f"0.{name}": weight + 1 for name, weight in experts.state_dict().items()}
    call = inputs(4)

    def is_as_it_was() -> bool:
        with torch.no_grad():
            return torch.equal(packed[0](*call), experts(*call))

    with pytest.raises(ValueError, match=r"0.down_proj: expected shape \[5, 384, 512\], got \[5, 383, 512\]"):
        packed.load_state_dict(state | {"0.down_proj": state["0.down_proj"][:, :-1]})
    assert is_as_it_was()  # nothing was loaded of the other projection
    with pytest.raises(ValueError, match=r"0.gate_up_proj: expected shape \[5, 512, 768\], got \[5, 511, 768\]"):
        packed.load_state_dict(state | {"0.gate_up_proj": state["0.gate_up_proj"][:, :-1]}, strict=False)
    assert is_as_it_was()
    del state["0.down_proj"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.down_proj"'):
        packed.load_state_dict(state)
    packed.load_state_dict(state, strict=False)
    with torch.no_grad():
        experts.gate_up_proj += 1
    assert is_as_it_was()


@forms
def test_autocast(form: Form) -> None:
    x, ids, weights = inputs(5, torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        experts = make_experts(dtype=dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(form.packed(experts)(x, ids, weights), experts(x, ids, weights))
    with pytest.raises(TypeError, match="gate_up_proj: expected"):
        form.packed(experts)(x.bfloat16(), ids, weights)


@forms
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(form: Form, backend: str) -> None:
    packed = form.packed(make_experts())
    call = inputs(7)
    compiled = torch.compile(packed, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert torch.equal(compiled(*call), packed(*call))


@forms
def test_with_adapters(form: Form) -> None:
    """Stored after add_lora: the adapters learn, the projections are frozen before and after."""
    experts = make_experts()
    adapters = compress.add_lora(experts, 4)
    call = inputs(6)
    y = experts(*call)
    form.store(experts)
    torch.testing.assert_close(experts(*call), y)
    experts(*call).sum().backward()
    assert all(adapter.grad is not None for adapter in adapters)
    form.restore(experts)
    assert not experts.down_proj.requires_grad


@forms
def test_errors(form: Form) -> None:
    packed = form.packed(make_experts())
    assert form.store(packed) == 1  # again
    for model, reason in (
        (nn.Linear(2, 2), "Linear has no experts that run on the fused kernel"),
        (make_experts(device="meta"), f"gate_up_proj is on meta, and {form.noun} are for the CPU"),
    ):
        with pytest.raises(ValueError, match=f"model: expected experts that can be stored as {form.noun}; {reason}"):
            form.store(model)
        assert form.restore(model) == 0
    for other in FORMS:
        if other is not form:
            with pytest.raises(ValueError, match=f"gate_up_proj is stored as {form.noun}"):
                other.store(packed)
    with pytest.raises(ValueError, match=f"expected plain weights, got {form.noun}; take that back first"):
        compress.quantize(packed, "int8")
    with pytest.raises(ValueError, match=f"expected plain or quantised projections, got {form.noun}"):
        compress.add_lora(packed, 2)
    x, ids, weights = inputs(3)
    with pytest.raises(ValueError, match=r"x: expected shape \[..., 512\], got \[3, 511\]"):
        packed(x[:, :-1], ids, weights)
    with pytest.raises(ValueError, match="panels: expected either panels or compact, got both"):
        make_experts().pack_(panels=True, compact=True)


def model_of(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=512, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_local_experts=4, max_position_embeddings=64, pad_token_id=0,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForCausalLM")(config).to(torch.bfloat16).eval().requires_grad_(False)


@forms
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])  # the latter's are transposed, interleaved and have biases
def test_a_model_of_transformers(form: Form, name: str, tmp_path: Path) -> None:
    model = model_of(name)
    switchgear.accelerate(model)
    prompt = torch.arange(1, 9)[None]
    logits, before = model(prompt).logits, {key: w.clone() for key, w in model.state_dict().items()}
    text = model.generate(prompt, max_new_tokens=6, do_sample=False)
    if name == "GptOss":
        switchgear.pack_weights(model)
    assert form.store(model) == 2
    assert torch.equal(model(prompt).logits, logits)
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), text)
    assert all(torch.equal(w, before[key]) for key, w in model.state_dict().items())

    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], w) for key, w in before.items())
    assert form.restore(model) == 2
    assert torch.equal(model(prompt).logits, logits)
