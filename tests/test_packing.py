# SPDX-License-Identifier: BSD-3-Clause
"""Weights in panels give the bits of plain weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import switchgear
from switchgear import ops, reference
from switchgear.packing import panels_of, to_panels

SIZES = (70, 128, 5, 2)  # H, I, E, K: H is no multiple of a cache line


def make_experts(dtype: torch.dtype, hidden_size: int = 128, **options: bool) -> switchgear.Experts:
    experts = switchgear.Experts(hidden_size, 64, 5, dtype=dtype, **options).requires_grad_(False)  # type: ignore[arg-type]
    for parameter in experts.parameters():
        parameter.normal_(std=0.1)
    return experts


def inputs(dtype: torch.dtype, num_tokens: int, hidden_size: int = 128) -> tuple[torch.Tensor, ...]:
    ids = torch.rand(num_tokens, 5).argsort(-1)[:, :2].int()
    return torch.randn(num_tokens, hidden_size).to(dtype), ids, torch.rand(num_tokens, 2)


def packs(dtype: torch.dtype) -> None:
    if ops.panel(dtype) == 0:
        pytest.skip(f"{switchgear.cpu_isa()} has no panels of {dtype}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"gated": False}, {"interleaved": True}, {"transposed": True}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_same_bits(isa: str, options: dict[str, bool], dtype: torch.dtype) -> None:
    packs(dtype)
    experts = make_experts(dtype, **options)
    packed = copy.deepcopy(experts).pack_()
    assert panels_of(packed) is not None
    for num_tokens in (0, 1, 3, 16, 70, 700):  # all kinds of tiles, and experts beyond the rows of one product
        x, ids, weights = inputs(dtype, num_tokens)
        assert torch.equal(packed(x, ids, weights), experts(x, ids, weights)), num_tokens
    wide = make_experts(dtype, 4480 // 64 * 64)  # several chunks of depth
    x, ids, weights = inputs(dtype, 9, 4480 // 64 * 64)
    y = wide(x, ids, weights)
    assert torch.equal(wide.pack_()(x, ids, weights), y)


def test_panels_and_their_inverse() -> None:
    weight = torch.randn(3, 8, 6)
    for plain in (weight, weight.bfloat16(), weight.mT.contiguous().mT):
        packed = to_panels(plain, 4)
        depth = 4 // plain.element_size()
        assert packed.flatten()[: 4 * depth].equal(plain[0, :4, :depth].flatten())
        assert reference.from_panels(packed, 4).equal(plain)
    with pytest.raises(ValueError, match="panel"):
        reference.from_panels(weight, 3)


def test_reference_takes_panels(isa: str) -> None:
    packs(torch.float32)
    experts = make_experts(torch.float32).pack_()
    x, ids, weights = inputs(torch.float32, 9)
    y = experts(x, ids, weights)
    with switchgear.use_backend("reference"):
        torch.testing.assert_close(experts(x, ids, weights), y)


@pytest.mark.parametrize("transposed", [False, True])
def test_state_dict_stays_plain(transposed: bool) -> None:
    experts = make_experts(torch.float32, transposed=transposed)
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    experts.pack_()
    assert experts.gate_up_proj.numel() == 0
    after = experts.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)

    x, ids, weights = inputs(torch.float32, 4)
    y = experts(x, ids, weights)
    other = make_experts(torch.float32, transposed=transposed).pack_()
    other.load_state_dict(after)
    assert torch.equal(other(x, ids, weights), y)
    for duplicate in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert torch.equal(duplicate(x, ids, weights), y)
        assert torch.equal(duplicate.unpack_()(x, ids, weights), y)
        assert torch.equal(duplicate.state_dict()["gate_up_proj"], before["gate_up_proj"])

    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({name: tensor[:, :32] for name, tensor in after.items()})


def test_unpacked_experts_train_again() -> None:
    experts = make_experts(torch.float32).pack_().unpack_().requires_grad_()
    x, ids, weights = inputs(torch.float32, 4)
    experts(x, ids, weights).sum().backward()
    assert experts.gate_up_proj.grad is not None
    assert experts.gate_up_proj.grad.abs().sum() > 0


def test_a_whole_layer() -> None:
    moe = switchgear.MoE(128, 64, 8, 2).requires_grad_(False)
    x = torch.randn(7, 128)
    y = moe(x)
    assert switchgear.pack_weights(moe) == 1
    assert switchgear.pack_weights(moe) == 1  # again: nothing to do
    assert torch.equal(moe(x), y)
    assert torch.equal(torch.compile(moe, fullgraph=True, backend="eager")(x), y)
    assert switchgear.unpack_weights(moe) == 1
    assert switchgear.unpack_weights(moe) == 0
    assert torch.equal(moe(x), y)


def test_errors() -> None:
    with pytest.raises(ValueError, match="model: expected experts that can be packed; Linear has no experts"):
        switchgear.pack_weights(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="do not divide into panels"):
        switchgear.pack_weights(switchgear.Experts(128, 63, 2))
    with pytest.raises(ValueError, match=r"no panels of torch\.float16"):
        switchgear.pack_weights(switchgear.Experts(128, 64, 2, dtype=torch.float16))

    experts = make_experts(torch.float32).pack_()
    x, ids, weights = inputs(torch.float32, 4)
    with pytest.raises(ValueError, match="panel: expected 0 where gradients are recorded"):
        experts(x.requires_grad_(), ids, weights)
    with pytest.raises(TypeError, match="gate_up_proj"):
        experts(x.detach().bfloat16(), ids, weights)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), pytest.raises(TypeError, match=r"cannot be cast"):
        experts(x, ids, weights)
    gate_up_proj, down_proj = torch.randn(2, 128, 32), torch.randn(2, 32, 64)
    for panel in (1, -64, 63):
        with torch.no_grad(), pytest.raises(ValueError, match="panel: expected 0 or"):
            switchgear.moe(x[:, :32], gate_up_proj, down_proj, ids.clamp(max=1), weights, panel=panel)
    panel = ops.panel(torch.float32)
    with torch.no_grad(), pytest.raises(ValueError, match="gate_up_proj: expected panels"):
        switchgear.moe(x[:, :32], gate_up_proj[:, :-2], down_proj[:, :, 1:], ids.clamp(max=1), weights, panel=panel)


def test_other_kernels_refuse_panels(isa: str) -> None:
    packs(torch.bfloat16)  # only AVX-512-BF16 reads pairs of bfloat16
    experts = make_experts(torch.bfloat16).pack_()
    switchgear.set_cpu_isa("generic")
    with pytest.raises(ValueError, match="panel: expected 0, the layout of bfloat16 weights on this backend now"):
        experts(*inputs(torch.bfloat16, 4))


def test_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for kind in ("Mixtral", "GptOss"):
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, num_local_experts=4, max_position_embeddings=64, pad_token_id=0,
            eos_token_id=None, bos_token_id=None,
        )  # fmt: skip
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
        switchgear.accelerate(model)
        prompt = torch.arange(1, 9)[None]
        logits, before = model(prompt).logits, {name: w.clone() for name, w in model.state_dict().items()}
        text = model.generate(prompt, max_new_tokens=6, do_sample=False)
        assert switchgear.pack_weights(model) == 2
        assert torch.equal(model(prompt).logits, logits)
        assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), text)
        assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
        model.set_experts_implementation("eager")  # cannot read panels, and must not read something else
        with pytest.raises((RuntimeError, IndexError)):
            model(prompt)
        switchgear.unpack_weights(model)
        torch.testing.assert_close(model(prompt).logits, logits)
