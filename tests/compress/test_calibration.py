# SPDX-License-Identifier: BSD-3-Clause
"""calibrate: against loops over experts and tokens in float64; streaming, domains, padding, files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import FAMILIES, expert, hugging_face, our_model, row_batches, token_batches
from torch import Tensor

import switchgear
from errors import raises
from full_disk import full_disk
from switchgear.compress import Calibration, calibrate
from switchgear.compress.sums import Samples
from switchgear.files import DiskFull
from switchgear.integrations.moe_blocks import moe_blocks
from switchgear.trace import Observation, observe


def seen_by(model: Any, batches: list[dict[str, Any]]) -> dict[str, list[tuple[str, Observation]]]:
    """All observations by layer, with their domain."""
    found: dict[str, list[tuple[str, Observation]]] = {name: [] for name in moe_blocks(model)}
    with torch.no_grad():
        for batch in batches:
            named = dict(batch)
            domain = named.pop("domain")
            with observe(model, lambda name, seen, domain=domain: found[name].append((domain, seen))):
                model(**named)
    return found


def loop(model: Any, name: str, seen: list[tuple[str, Observation]], domain: str | None) -> dict[str, Tensor]:
    """The statistics of a layer, token by token."""
    block = moe_blocks(model)[name]
    count, sums = block.num_experts, {}
    shapes = {"inputs": "x", "gated_inputs": "x", "hidden": "a", "gated_hidden": "a", "outputs": "y"}

    def add(key: str, index: int, value: Tensor) -> None:
        if key not in sums:
            sums[key] = torch.zeros(count, *value.shape, dtype=torch.float64)
        sums[key][index] += value

    for label, one in seen:
        if domain not in (None, label):
            continue
        for t in range(len(one.x)):
            if one.token_mask is not None and not one.token_mask[t]:
                continue
            for e, g in zip(one.topk_ids[t].tolist(), one.topk_weights[t].double(), strict=True):
                x = one.x[t : t + 1].double()
                a, y = expert(block, e, x)
                add("counts", e, torch.tensor(1.0))
                add("weights", e, g)
                add("norms", e, y.norm())
                add("saliency", e, g * y.norm())
                values = {"x": x[0], "a": a[0], "y": y[0]}
                for key, of in shapes.items():
                    if key == "outputs":
                        add(key, e, values[of])
                    else:
                        add(key, e, (values[of] * (g if "gated" in key else 1)).square())
                add("hessian_inputs", e, x.mT @ x)
                add("hessian_hidden", e, a.mT @ a)
    return sums


def compare(model: Any, batches: list[dict[str, Any]], calibration: Calibration, domain: str | None = None) -> None:
    for name, seen in seen_by(model, batches).items():
        want, layer = loop(model, name, seen, domain), calibration.layers[name]
        got = layer.sums(domain)
        for key, value in want.items():
            if key.startswith("hessian"):
                if layer.hessians is None or domain is not None:
                    continue
                found = getattr(layer.hessians, key[8:]).double()
            else:
                found = getattr(got, key).double()
            # float32 products of up to 64 terms: sums of roundings of 2^-24 relative to the largest value
            torch.testing.assert_close(found, value, rtol=1e-4, atol=float(value.abs().max()) * 1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_row45_statistics_of_hugging_face(model_type: str) -> None:
    """Padding is left out; weights are those that the experts get."""
    model, batches = hugging_face(model_type), token_batches()
    calibration = calibrate(model, batches, hessians=True)
    compare(model, batches, calibration)
    compare(model, batches, calibration, "b")
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert all(int(layer.sums().tokens) == tokens for layer in calibration.layers.values())


def test_masks_of_other_shapes_leave_padding_out() -> None:
    model, x, mask = our_model(), torch.randn(2, 6, 16), torch.ones(2, 6, dtype=torch.bool)
    mask[0, :2], mask[1, 3:] = False, False
    want = calibrate(model, [{"x": x, "attention_mask": mask}]).layers["layers.1"].sums().tensors()
    added = torch.zeros(2, 6).masked_fill(~mask, torch.finfo(torch.float32).min)
    for other in (mask[:, None, None], mask[:, None].long(), added[:, None, None]):
        got = calibrate(model, [{"x": x, "attention_mask": other}]).layers["layers.1"].sums().tensors()
        assert all(torch.equal(got[key], value) for key, value in want.items())
    assert int(want["tokens"]) == int(mask.sum())


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"interleaved": True, "transposed": True}])
def test_row47_statistics_of_ours(options: dict[str, Any]) -> None:
    model, batches = our_model(**options), row_batches()
    calibration = calibrate(model, batches, hessians=True)
    if not options.get("interleaved"):
        compare(model, batches, calibration)
    else:  # the same experts, stored in another layout
        plain = our_model()
        plain.load_state_dict({
            key: (value.mT.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2) if "gate_up" in key else value.mT)
            if value.dim() == 3 else value
            for key, value in model.state_dict().items()
        })  # fmt: skip
        compare(plain, batches, calibration)


def test_row47_streaming_equals_the_full_batch() -> None:
    model, batches = our_model(dtype=torch.float64), row_batches(4, dtype=torch.float64)
    whole = [{"x": torch.cat([batch["x"] for batch in batches]), "domain": "a"}]
    streamed, full = calibrate(model, batches, hessians=True), calibrate(model, whole, hessians=True)
    for name, layer in streamed.layers.items():
        for key, value in full.layers[name].sums().tensors().items():
            torch.testing.assert_close(layer.sums().tensors()[key], value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.hessians.inputs, full.layers[name].hessians.inputs, rtol=1e-5, atol=1e-5)


def test_row48_median_of_the_ratio() -> None:
    model, batches = our_model(), row_batches()
    calibration = calibrate(model, batches)
    for name, seen in seen_by(model, batches).items():
        weights = torch.cat([one.topk_weights for _, one in seen]).sort(-1, descending=True).values
        want = float((weights[:, 1] / weights[:, 0]).median())
        assert calibration.layers[name].ratio_median() == pytest.approx(want, abs=1 / 4096)


def test_parts_add_up_and_files(tmp_path: Path) -> None:
    model, batches = hugging_face("mixtral"), token_batches(4)
    whole = calibrate(model, batches, hessians=True, samples=20)
    parts = [calibrate(model, batches[index::2], hessians=True, samples=20, seed=index) for index in range(2)]
    parts[0].save(tmp_path / "a.safetensors")
    joined = Calibration.load(tmp_path / "a.safetensors") + parts[1]
    for name, layer in joined.layers.items():
        for key, value in whole.layers[name].sums().tensors().items():
            torch.testing.assert_close(layer.sums().tensors()[key], value)
        assert layer.shape == whole.layers[name].shape
        assert layer.domains.keys() == {"a", "b"}
        torch.testing.assert_close(layer.hessians.hidden, whole.layers[name].hessians.hidden)
        sample = layer.sample("a")
        assert len(sample.x) == 20
        assert sample.keys.tolist() == sorted(sample.keys.tolist())
    joined.check(model)


def test_samples_are_tokens_of_the_data() -> None:
    """Each is a token of its domain with its own choice; all layers keep the same ones."""
    model, batches = our_model(), row_batches()
    calibration = calibrate(model, batches, samples=7)
    first = calibration.layers["layers.0"]
    data = {domain: torch.cat([b["x"] for b in batches if b["domain"] == domain]) for domain in "ab"}
    for domain in "ab":
        sample = first.sample(domain)
        at = [int((data[domain] == row).all(1).nonzero()[0]) for row in sample.x]
        assert len(set(at)) == 7
        routing = model.layers[0].gate(sample.x)
        assert torch.equal(sample.topk_ids, routing.topk_ids)
    assert len(first.sample().x) == 14
    everything = calibrate(model, batches, samples=1000).layers["layers.0"].sample("a")
    assert sorted(everything.x.sum(1).tolist()) == sorted(data["a"].sum(1).tolist())


def test_repr_is_short() -> None:
    assert repr(calibrate(our_model(), row_batches(), hessians=True)) == "Calibration(2 layers, domains ['a', 'b'])"


def test_another_model_is_refused() -> None:
    calibration = calibrate(our_model(), row_batches())
    for other in (
        our_model(seed=1), our_model(num_experts=4), our_model(top_k=1)
    ):  # fmt: skip
        with raises(ValueError, "calibration"):
            calibration.check(other)
        with raises(ValueError, "calibration"):
            calibration + calibrate(other, row_batches())
    calibration.check(our_model())


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("0.hessians.inputs", [7, 16, 16]),
        ("1.hessians.hidden", [8, 12, 11]),
        ("0.sums.0.counts", [7]),
        ("0.samples.0.x", [31, 16]),
        ("0.samples.0.topk_weights", [32, 1]),
        ("1.samples.1.topk_ids", [32]),
    ],
)
def test_files_with_other_shapes_are_refused(tmp_path: Path, key: str, shape: list[int]) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    calibrate(our_model(), row_batches(2), hessians=True, samples=32).save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dict)
        metadata = file.metadata()
    tensors[key] = tensors[key].flatten()[: math.prod(shape)].view(shape).clone()
    save_file(tensors, path, metadata)
    with raises(ValueError, "path"):
        Calibration.load(path)


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    calibration = calibrate(our_model(), row_batches(2))
    calibration.save(path)
    before = path.read_bytes()
    with full_disk(), raises(DiskFull):
        calibration.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_arguments(tmp_path: Path) -> None:
    model = our_model().train()
    with raises(ValueError, "batches"):
        calibrate(model, [])
    row = torch.zeros(2, 16)
    for batches in (5, row, {"x": row}):
        with raises(TypeError, "batches"):
            calibrate(model, batches)  # type: ignore[arg-type]
    for batch in ([1, 2], {"x": [[1.0, 2.0]], "domain": "a"}, ()):
        with raises(TypeError, "batches"):
            calibrate(model, [batch])
    with raises(TypeError, "batches"):
        calibrate(model, [5])
    with raises(ValueError, "layers"):
        calibrate(model, row_batches(), layers=["other"])
    with raises(TypeError, "layers"):
        calibrate(model, row_batches(), layers=5)  # type: ignore[arg-type]
    with raises(TypeError, "domain"):
        calibrate(model, [{"x": torch.zeros(2, 16), "domain": 3}])
    for options in ({"hessians": "no"}, {"seed": "x"}):
        with raises(TypeError, next(iter(options))):
            calibrate(model, row_batches(), **options)  # type: ignore[arg-type]
    assert model.training
    switchgear.store(model, "int8")
    with raises(ValueError):
        calibrate(model, row_batches())
    (tmp_path / "x").write_bytes(b"no calibration")
    with raises(ValueError, "path"):
        Calibration.load(tmp_path / "x")


def test_parts_with_and_without_hessians_are_refused() -> None:
    """Their sum would have Hessians of some tokens and counts of all."""
    model, batches = our_model(), row_batches()
    one, other = calibrate(model, batches[:1], hessians=True), calibrate(model, batches[1:], seed=1)
    for first, second in ((one, other), (other, one)):
        with raises(ValueError, "calibration"):
            first + second


def test_samples_of_different_limits_add_up_to_a_uniform_one() -> None:
    """Of two equal populations each gives about half: 50 tokens with the smallest keys of all 2000."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randperm(2000, generator=generator)
    x = torch.arange(2000.0)[:, None]
    ids, weights = torch.zeros(2000, 1, dtype=torch.int32), torch.ones(2000, 1)
    parts = [
        Samples.of(limit, keys[half], x[half], ids[half], weights[half])
        for limit, half in ((500, slice(1000)), (50, slice(1000, 2000)))
    ]
    for one, other in (parts, parts[::-1]):
        total = one + other
        assert total.limit == 50
        assert total.x[:, 0].tolist() == keys.argsort()[:50].tolist()
