# SPDX-License-Identifier: BSD-3-Clause
"""quantize: GPTQ against a loop from the paper and against rounding; bits per expert, storage, sizes, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import clone, expert, hugging_face, our_model, row_batches, tied_model, token_batches
from torch import Tensor, nn

import switchgear
from errors import raises
from switchgear import compress
from switchgear.compress import allocate_bits, bits_of, calibrate, expert_errors, packed_bytes, quantize
from switchgear.compress.levels import decode, gptq, round_to_nearest, sum_row_errors
from switchgear.integrations.moe_blocks import moe_blocks
from switchgear.reference import groups


def problem(columns: int = 96, rows: int = 24, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [2,N,C] and Hessians of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, rows, columns, generator=generator)
    mixing = torch.randn(2, columns, columns, generator=generator) / columns**0.5 + 0.3
    x = torch.randn(2, tokens, columns, generator=generator) @ mixing
    return weight, x.mT @ x


def gptq_by_the_paper(weight: Tensor, hessian: Tensor, bits: int, size: int) -> Tensor:
    """Algorithm 1 of arXiv:2210.17323 in float64, column by column without blocks, for one matrix [N,C]."""
    w, h = weight.double().clone(), hessian.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    result = torch.zeros_like(w)
    for column in range(w.shape[1]):
        if column % size == 0:
            group = w[:, None, column : column + size].float()
            scale, zero = groups.fit(group, torch.ones(1, group.shape[2], dtype=torch.bool), bits, True)
            scale, zero = scale[:, 0], zero[:, 0]
        level = groups.round_to_levels(w[:, column, None].float(), scale, zero, bits)[:, 0].double()
        result[:, column] = (2 * level - 1 if bits == 1 else level - zero.double()) * scale.double()
        error = (w[:, column] - result[:, column]) / inverse[column, column]
        w[:, column:] -= error[:, None] * inverse[column, column:]
    return result


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("columns", "size"), [(96, 32), (320, 64), (160, 0), (200, 96)])
def test_row48_gptq_equals_the_paper(bits: int, columns: int, size: int) -> None:
    """A level may flip where float32 and float64 round a tie differently, so almost all rows agree, not all."""
    weight, hessian = problem(columns)
    found = decode(gptq(weight, hessian, bits, size), bits, size)
    plain = decode(round_to_nearest(weight, bits, size, True), bits, size)
    for index in range(2):
        want = gptq_by_the_paper(weight[index], hessian[index], bits, size or columns)
        exact = hessian[index].double()[None]
        lost, from_rounding = (
            sum_row_errors((weight[index].double() - q.double())[None], exact)[0] for q in (want, plain[index])
        )
        want = torch.where((lost < from_rounding)[:, None], want, plain[index].double())
        agree = (found[index].double() - want).abs().amax(1) < 1e-3
        assert agree.float().mean() > 0.8
        total = sum_row_errors((weight[index].double() - found[index].double())[None], exact).sum()
        assert float(total) <= float(torch.minimum(lost, from_rounding).sum()) * 1.02


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"symmetric": False}])
def test_row48_gptq_is_never_worse_than_rounding(bits: int, options: dict[str, Any]) -> None:
    weight, hessian = problem()
    symmetric = options.get("symmetric", True)
    better = decode(gptq(weight, hessian, bits, 32, **options), bits, 32)
    plain = decode(round_to_nearest(weight, bits, 32, symmetric), bits, 32)
    errors = [sum_row_errors((weight - q).double(), hessian.double()) for q in (better, plain)]
    assert bool((errors[0] <= errors[1] * (1 + 1e-4)).all())
    assert float(errors[0].sum()) < 0.8 * float(errors[1].sum())


def test_gptq_survives_dead_and_few_inputs() -> None:
    """Columns that are always zero, and fewer tokens than columns: no NaN, and dead columns are rounded to nearest."""
    weight, _ = problem(64)
    x = torch.randn(2, 5, 64)
    x[:, :, 7] = 0
    found = gptq(weight, x.mT @ x, 3, 0)
    assert bool(decode(found, 3, 0).isfinite().all())
    nothing = gptq(weight, torch.zeros(2, 64, 64), 3, 32)
    assert torch.equal(nothing.q, round_to_nearest(weight, 3, 32, True).q)


def test_a_singular_hessian_is_damped_as_little_as_it_needs() -> None:
    """Two equal inputs and no damping: the error is that of a little damping, not of as much as the diagonal."""
    weight, _ = problem(64)
    x = torch.randn(2, 500, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 64)
    x[:, :, 7] = x[:, :, 8]
    hessian = x.mT @ x
    errors = {
        damping: float(
            sum_row_errors(weight - decode(gptq(weight, hessian, 3, 0, damping=damping), 3, 0), hessian).sum()
        )
        for damping in (0, 1e-6, 1)
    }
    assert errors[0] < (errors[1e-6] + errors[1]) / 2


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_hessians_that_are_not_finite_are_refused(method: str) -> None:
    model, batches = our_model(), row_batches()
    batches[0]["x"][0, 3] = torch.nan
    calibration = calibrate(model, batches, hessians=True)
    message = "calibration"
    with raises(ValueError, message):
        quantize(model, 3, method=method, calibration=calibration)
    with raises(ValueError, message):
        expert_errors(model, calibration)


# ---- models ----------------------------------------------------------------------------------------------------------


def test_row48_stored_values_are_the_levels() -> None:
    """Stored, written into parameters, and decoded by the reference: the same numbers, with bits per expert."""
    model = our_model()
    bits = {"layers.0": [1, 2, 3, 4, 3, 2, 1, 4], "layers.1": 3}
    in_place, stored = clone(model), clone(model)
    result = quantize(in_place, bits, group_size=32, store=False)
    assert quantize(stored, bits, group_size=32).layers == result.layers
    assert bits_of(stored)["layers.0"] == bits["layers.0"]
    assert bits_of(stored)["layers.1"] == [3] * 8
    for name, block in moe_blocks(model).items():
        weight = block.experts.gate_up_proj.detach()
        widths = tuple(bits[name]) if isinstance(bits[name], list) else (3,) * 8
        want = groups.dequantize(groups.quantize(weight, widths, 32), 32)
        torch.testing.assert_close(moe_blocks(in_place)[name].experts.gate_up_proj, want, rtol=0, atol=0)
    x = torch.randn(9, 16)
    torch.testing.assert_close(stored(x), in_place(x), rtol=1e-4, atol=1e-5)
    switchgear.restore(stored)
    for (name, a), b in zip(in_place.named_parameters(), stored.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_row48_hugging_face(model_type: str, tmp_path: Path) -> None:
    """GPTQ is at most as wrong as rounding on the calibration data; a checkpoint loads in transformers."""
    model, batches = hugging_face(model_type), token_batches(4)
    calibration = calibrate(model, batches, hessians=True)
    results = {}
    for method in ("rtn", "gptq"):
        changed = clone(model)
        results[method] = quantize(
            changed, 2, method=method, group_size=32, calibration=calibration, store=False, min_tokens=1
        )
    for name, layer in results["gptq"].layers.items():
        for better, plain in zip(layer.output_errors, results["rtn"].layers[name].output_errors, strict=True):
            assert better <= plain * (1 + 1e-4)
    inputs = {key: value for key, value in batches[0].items() if key != "domain"}
    switchgear.accelerate(model)
    quantize(model, 2, method="gptq", group_size=32, calibration=calibration, min_tokens=1)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, changed(**inputs).logits, rtol=1e-3, atol=1e-4)
        model.save_pretrained(tmp_path)
        loaded = type(changed).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(loaded(**inputs).logits, changed(**inputs).logits, rtol=0, atol=1e-5)


def test_starved_experts_are_rounded_and_named() -> None:
    model = our_model()
    with torch.no_grad():
        model.layers[0].gate.weight[5] = 0
    batch = {"x": torch.randn(64, 16).abs() + 1, "domain": "a"}
    with torch.no_grad():
        model.layers[0].gate.weight[[0, 1]] = model.layers[0].gate.weight[[0, 1]].abs() + 1
    calibration = calibrate(model, [batch], hessians=True)
    counts = calibration.layers["layers.0"].sums().counts
    result = quantize(clone(model), 3, method="gptq", group_size=32, calibration=calibration, min_tokens=10)
    assert result.layers["layers.0"].rounded == (counts < 10).nonzero().flatten().tolist()
    assert 5 in result.starved["layers.0"]
    assert "got too few tokens" in str(result)
    plain = quantize(clone(model), 3, group_size=32, calibration=calibration)
    assert result.layers["layers.0"].errors[5] == plain.layers["layers.0"].errors[5]
    assert all(math.isfinite(e) for layer in result.layers.values() for e in layer.errors)


def test_row48_errors_of_experts() -> None:
    """‖F(x) − F'(x)‖ with one expert quantized, against a loop over the sample."""
    model = our_model(normalize=True)
    calibration = calibrate(model, row_batches(2), samples=100)
    errors = expert_errors(model, calibration, (1, 3), group_size=32)
    name = "layers.0"
    sample, block = calibration.layers[name].sample(), moe_blocks(model)[name]
    for column, bits in enumerate((1, 3)):
        rough = clone(model)
        quantize(rough, {name: bits}, group_size=32, store=False)
        for e in (0, 5):
            total = 0.0
            for t in range(len(sample.x)):
                for chosen, g in zip(sample.topk_ids[t].tolist(), sample.topk_weights[t].tolist(), strict=True):
                    if chosen == e:
                        x = sample.x[t : t + 1]
                        change = expert(block, e, x)[1] - expert(moe_blocks(rough)[name], e, x)[1]
                        total += g**2 * float(change.square().sum())
            assert float(errors.errors[name][e, column]) == pytest.approx(total**0.5, rel=1e-3)
    sums = calibration.layers[name].sums()
    torch.testing.assert_close(errors.frequencies[name], sums.counts.double() / 80)
    torch.testing.assert_close(errors.weights[name], sums.weights / 80)
    again = expert_errors(model, calibration, (3, 1, 3), group_size=32, layers=name)  # a name, as a list of one
    assert again.bits == (1, 3)
    assert torch.equal(again.errors[name], errors.errors[name])
    allocation = allocate_bits(errors, (1, 3), 2.0)
    result = quantize(model, allocation, group_size=32)
    assert result.average_bits == allocation.average <= 2.0
    assert bits_of(model).layers == allocation.layers


# ---- sizes -----------------------------------------------------------------------------------------------------------


def mixtral_on_meta() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(
            transformers.MixtralConfig(), dtype=torch.bfloat16
        )
    return model


def test_row48_packed_size_of_mixtral() -> None:
    """MC-MoE's 2.54 bits are experts at 2.5 on average and attention at 4, over both. The whole file at that: the
    weights, float16 scales per 128 columns, and embeddings, norms and router in 16 bits."""
    model = mixtral_on_meta()
    experts = {name: p for name, p in model.named_parameters() if "experts." in name}
    attention = {name: p for name, p in model.named_parameters() if "self_attn" in name}
    assert sum(p.numel() for p in model.parameters()) == 46_702_792_704
    weights = [(sum(p.numel() for p in group.values()), bits) for group, bits in ((experts, 2.5), (attention, 4.0))]
    average = sum(count * bits for count, bits in weights) / sum(count for count, _ in weights)
    assert average == pytest.approx(2.54, abs=0.005)
    allocation = [2, 3] * 4  # of eight experts
    packed = sum(
        sum(packed_bytes(p.shape[1], p.shape[2], bits, 128) for bits in allocation) for p in experts.values()
    ) + sum(packed_bytes(*p.shape, 4, 128) for p in attention.values())
    scales = sum(count / 128 * 2 for count, _ in weights)
    assert packed == pytest.approx(average / 8 * sum(count for count, _ in weights) + scales, rel=1e-9)
    rest = 2 * sum(p.numel() for name, p in model.named_parameters() if name not in {**experts, **attention})
    saved = 1 - (packed + rest) / (2 * 46_702_792_704)
    assert (packed + rest) / 1e9 == pytest.approx(16.02, abs=0.005)  # the authors' README: "around 16GB"
    assert saved == pytest.approx(0.8285, abs=0.0005)  # against bfloat16; their 76.6 % counts more than weights


def test_sizes_of_a_stored_model() -> None:
    """Real storage is the packed size where rows come in sixteens and columns in thirty-twos."""
    model = nn.ModuleList([switchgear.MoE(64, 32, 4, 2)])
    result = quantize(model, {"0": [1, 2, 3, 4]}, group_size=32)
    want = sum(packed_bytes(64, 64, bits, 32) + packed_bytes(64, 32, bits, 32) for bits in (1, 2, 3, 4))
    records = 2 * 4 * 2 * 4
    assert result.bytes_after == want + records
    assert result.bytes_before == 4 * (64 * 64 + 64 * 32) * 4


def test_inference_mode() -> None:
    """Experts quantized in inference mode can be used in later backward passes."""
    model = our_model()
    with torch.inference_mode():
        quantize(model, 3, group_size=32)
    x = torch.randn(3, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
    assert bool(gradient.any())


@pytest.mark.parametrize("store", [True, False])
def test_ties_stay(store: bool) -> None:
    """Layers that share parameters are quantized to the values of layers that do not, and share them afterwards."""
    model = tied_model()
    untied = clone(model)
    for name, parameter in list(untied.layers[1].experts.named_parameters()):
        setattr(untied.layers[1].experts, name, nn.Parameter(parameter.detach().clone()))
    first, second = (layer.experts for layer in model.layers)
    result, want = (quantize(each, 3, group_size=32, store=store) for each in (model, untied))
    assert result.bytes_before == first.hidden_size * 12 * 3 * 8 * 4
    assert 2 * result.bytes_after == want.bytes_after
    if store:
        for name in ("gate_up_proj_data", "gate_up_proj_scales", "down_proj_data", "down_proj_scales"):
            assert getattr(first, name).data_ptr() == getattr(second, name).data_ptr()
        switchgear.restore(model)
        switchgear.restore(untied)
    assert second.down_proj is first.down_proj
    assert second.gate_up_proj is not first.gate_up_proj
    assert second.gate_up_proj.data_ptr() == first.gate_up_proj.data_ptr()
    assert all(torch.equal(value, untied.state_dict()[name]) for name, value in model.state_dict().items())


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "options", "message"),
    [
        (5, {}, "bits"),
        (9, {"store": False}, "bits"),
        ({"layers.0": [3] * 7}, {}, "bits"),
        ({"other": 3}, {}, "bits"),
        (3, {"group_size": 20}, "group_size"),
        (3, {"method": "awq"}, "method"),
        (3, {"method": "gptq"}, "calibration"),
        ({}, {}, "bits"),
        (3, {"damping": -1.0}, "damping"),
        (None, {}, "bits"),
        ({"layers.0": None}, {}, "bits"),
        (3, {"calibration": "x"}, "calibration"),
    ],
)
def test_wrong_arguments(bits: Any, options: dict[str, Any], message: str) -> None:
    model = our_model()
    before = clone(model).state_dict()
    with raises((TypeError, ValueError), message):
        quantize(model, bits, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("bits", [{"layers.0": 3, "layers.1": 2}, {"layers.0": 3}, {"layers.1": 3}, 3])
def test_ties_that_would_break_are_refused(bits: Any, store: bool) -> None:
    model = tied_model()
    before = clone(model).state_dict()
    calibration = calibrate(model, row_batches(), hessians=True)
    method = "gptq" if bits == 3 else "rtn"
    with raises(ValueError, "model"):
        quantize(model, bits, method=method, calibration=calibration, store=store)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.layers[1].experts.down_proj is model.layers[0].experts.down_proj


def test_refused_models() -> None:
    model = our_model()
    calibration = calibrate(model, row_batches())
    with raises(ValueError, "calibration"):
        quantize(model, 3, method="gptq", calibration=calibration)
    with raises(ValueError, "calibration"):
        quantize(our_model(seed=1), 3, calibration=calibration)
    with raises(ValueError, "store"):
        quantize(hugging_face("mixtral"), 3)
    with torch.no_grad():
        model.layers[1].experts.down_proj[3] = torch.nan
    with raises(ValueError):
        quantize(model, 3)
    assert compress.bits_of(model).layers == {}
    assert str(compress.bits_of(model)) == "no experts"
    with raises(TypeError, "bits"):
        quantize(our_model(), 2.5)  # type: ignore[arg-type]
    with raises(ValueError, "layers"):
        compress.expert_errors(our_model(), calibration, layers=["other"])
    with raises(TypeError, "bits"):
        compress.expert_errors(our_model(), calibration, 3)  # type: ignore[arg-type]
    with raises(TypeError, "calibration"):
        compress.expert_errors(our_model(), None)  # type: ignore[arg-type]
    with raises(ValueError, "domains"):
        compress.expert_errors(our_model(), calibration, group_size=32, domains="other")


@pytest.mark.parametrize("switch", ["symmetric", "store", "act_order"])
def test_words_are_no_switches(switch: str) -> None:
    with raises(TypeError, switch):
        quantize(our_model(), 3, **{switch: "no"})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bits": 0}, ValueError, "bits"),
        ({"bits": 9}, ValueError, "bits"),
        ({"weight": torch.ones(4, 32)}, ValueError, "weight"),
        ({"weight": [1]}, TypeError, "weight"),
        ({"hessian": torch.eye(16)[None]}, ValueError, "hessian"),
        ({"hessian": torch.full((1, 32, 32), torch.nan)}, ValueError, "hessian"),
        ({"group_size": -1}, ValueError, "group_size"),
        ({"damping": -1}, ValueError, "damping"),
        ({"act_order": "no"}, TypeError, "act_order"),
    ],
)
def test_wrong_arguments_of_gptq(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with raises(error, message):
        gptq(
            **{"weight": torch.ones(1, 4, 32), "hessian": torch.eye(32)[None], "bits": 3, "group_size": 0, **arguments}
        )


def test_integers_of_numpy_are_numbers_of_bits() -> None:
    found = quantize(our_model(), {"layers.0": np.int64(3), "layers.1": [np.int32(2)] * 8}, group_size=32)
    assert found.layers["layers.0"].bits == [3] * 8
    assert found.layers["layers.1"].bits == [2] * 8


def test_errors_of_no_widths_are_refused() -> None:
    model, calibration = our_model(), calibrate(our_model(), row_batches())
    with raises(ValueError, "bits"):
        expert_errors(model, calibration, bits=())
