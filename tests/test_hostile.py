# SPDX-License-Identifier: BSD-3-Clause
"""Hostile input: arrays and tensors that describe memory wrongly or unusually, and memory that changes during a call.
It raises an error that names the argument, or gives the result of a clean copy; it never crashes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

import switchgear
from errors import raises
from fuzz.forged_arrays import Forged
from switchgear import _C, presets
from switchgear.routing import Capacity, SkipBelow, TopK, ZLoss
from switchgear.testing import Case, make_layer
from switchgear.weights import Int4

LOGITS = np.random.default_rng(0).standard_normal((4, 8), np.float32)
CASE = Case("hostile", 5, 2, 4, 12, 6, "holes")
NAMES = ("x", "gate_up_proj", "down_proj", "topk_ids", "topk_weights")


def layer() -> dict[str, Tensor]:
    """The arguments of a valid call of `moe`."""
    made = make_layer(CASE)
    return {name: getattr(made, name) for name in NAMES}


# ---- arrays of other libraries ---------------------------------------------------------------------------------------

ODD_ARRAYS: dict[str, np.ndarray] = {
    "rows reversed": LOGITS[::-1],
    "columns reversed": LOGITS[:, ::-1],
    "one row, reversed": LOGITS[:1][::-1],
    "no rows, reversed": LOGITS[:0][::-1],
    "one row repeated": np.broadcast_to(LOGITS[:1], (4, 8)),
    "a stride of 2^62 that is not used": as_strided(LOGITS, (1, 8), (2**62, 4)),
    "a field of records": np.array([[(1, 2.5)] * 8] * 4, [("a", "i1"), ("b", "f4")])["b"],
    "many dimensions": LOGITS.reshape(*[1] * 40, 4, 8),
}


@pytest.mark.parametrize("name", ODD_ARRAYS)
def test_odd_arrays_equal_their_copies(name: str, backend: str) -> None:
    array = ODD_ARRAYS[name]
    for got, wanted in zip(switchgear.route(array, 2)[:2], switchgear.route(array.copy(), 2)[:2], strict=True):
        assert np.array_equal(got, wanted)


def test_arguments_are_arrays_with_negative_strides(backend: str) -> None:
    bias = np.arange(8, dtype=np.float32)
    got = switchgear.route(LOGITS, 2, selection_bias=bias[::-1]).topk_ids
    assert np.array_equal(got, switchgear.route(LOGITS, 2, selection_bias=bias[::-1].copy()).topk_ids)


WRONG_ARRAYS: dict[str, np.ndarray] = {
    "big-endian": LOGITS.astype(">f4"),
    "longdouble": LOGITS.astype(np.longdouble),
    "objects": LOGITS.astype(object),
    "strings": LOGITS.astype(str),
    "dates": LOGITS.astype("M8[s]"),
    "bool": LOGITS > 0,
    "complex": LOGITS.astype(complex),
    "no dimensions": np.zeros((), np.float32),
    "no experts": LOGITS[:, :0],
}


@pytest.mark.parametrize("name", WRONG_ARRAYS)
def test_wrong_arrays(name: str, backend: str) -> None:
    with raises((TypeError, ValueError), "router_logits"):
        switchgear.route(WRONG_ARRAYS[name], 2)
    with raises((TypeError, ValueError), "selection_bias"):
        switchgear.route(LOGITS, 2, selection_bias=WRONG_ARRAYS[name])


# ---- capsules of DLPack ----------------------------------------------------------------------------------------------


FORGED: dict[str, tuple[type[Exception], Forged]] = {
    "a stride of 2^63 - 1": (ValueError, Forged((2, 4), (2**63 - 1, 1))),
    "a stride of -2^63": (ValueError, Forged((2, 4), (-(2**63), 1))),
    "strides that add up to 2^63": (ValueError, Forged((2, 2), (2**62, 2**62))),
    "2^63 bytes": (ValueError, Forged((2**31, 2**31), (2**30, 1))),
    "sizes that multiply to 2^64": (ValueError, Forged((2**32, 2**32))),
    "a negative stride and no copy": (TypeError, Forged((2, 4), (-4, 1))),
    "a negative size": (ValueError, Forged((2, -4))),
    "no data": (ValueError, Forged((2, 4), data=0)),
    "vectors": (TypeError, Forged((2, 2), lanes=2)),
    "4 bits": (TypeError, Forged((2, 4), bits=4)),
    "a dtype that does not exist": (TypeError, Forged((2, 4), code=77)),
    "a negative number of dimensions": (ValueError, Forged((2, 4), ndim=-1)),
    "65 dimensions": (ValueError, Forged((1,) * 65)),
}


def test_forged_array_is_read() -> None:
    assert switchgear.route(Forged((2, 4)), 2).topk_ids.tolist() == [[0, 1]] * 2


@pytest.mark.parametrize("name", FORGED)
def test_forged_arrays(name: str) -> None:
    error, array = FORGED[name]
    with raises(error, "router_logits"):
        switchgear.route(array, 2)
    with raises((TypeError, ValueError), "h"):
        _C.glu((array,), ("silu", True, False, 1.0, 0.0), (torch.empty(2, 2),), 1)


def test_no_capsule() -> None:
    class Liar(Forged):
        def __dlpack__(self, **_: Any) -> Any:
            return "capsule"

    with raises(TypeError, "router_logits"):
        switchgear.route(Liar((2, 4)), 2)


# ---- tensors whose memory is not what it seems -----------------------------------------------------------------------


def negated(tensor: Tensor) -> Tensor:
    """The same values as a view with the negative bit, whose memory has the opposite sign."""
    return torch._neg_view(-tensor)


def freed(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    return copy


def freed_at_an_offset(tensor: Tensor) -> Tensor:
    """As FSDP leaves a parameter: a view of a flat tensor without memory."""
    both = torch.stack((tensor, tensor))
    second = both[1]
    both.untyped_storage().resize_(0)
    return second


@pytest.mark.parametrize("name", NAMES)
def test_negative_views(name: str, backend: str) -> None:
    args = layer()
    assert torch.equal(switchgear.moe(**args | {name: negated(args[name])}), switchgear.moe(**args))


def test_negative_views_in_a_weight(isa: str) -> None:
    args = layer()
    weights = {name: args[name] for name in ("gate_up_proj", "down_proj")}
    stored = {
        name: switchgear.Weight("plain", negated(weight), *weight.shape[1:], weight.dtype)
        for name, weight in weights.items()
    }
    assert torch.equal(switchgear.moe(**args | stored), switchgear.moe(**args))


@pytest.mark.parametrize("free", [freed, freed_at_an_offset])
@pytest.mark.parametrize("name", NAMES)
def test_freed_storage(name: str, free: Callable[[Tensor], Tensor], isa: str) -> None:
    args = layer()
    with raises(ValueError, name):
        switchgear.moe(**args | {name: free(args[name])})


def shrunk(tensor: Tensor) -> Tensor:
    """A tensor whose storage holds all of it but its last byte."""
    copy = tensor.clone()
    copy.untyped_storage().resize_(copy.nbytes - 1)
    return copy


def shrunk_at_an_offset(tensor: Tensor) -> Tensor:
    """A view of a larger tensor, of which the first half is left."""
    both = torch.stack((tensor, tensor))
    second = both[1]
    both.untyped_storage().resize_(tensor.nbytes)
    return second


@pytest.mark.parametrize("shrink", [shrunk, shrunk_at_an_offset])
@pytest.mark.parametrize("name", NAMES)
def test_shrunk_storage(name: str, shrink: Callable[[Tensor], Tensor], isa: str) -> None:
    args = layer()
    with raises(ValueError, name):
        switchgear.moe(**args | {name: shrink(args[name])})


def test_storage_that_is_larger_than_its_tensor(isa: str) -> None:
    """A view with gaps, up to the last byte of its storage, is valid."""
    args = layer()
    x = torch.stack((args["x"], args["x"]), 1)[:, 1]
    x.untyped_storage().resize_(x.untyped_storage().nbytes())
    assert torch.equal(switchgear.moe(**args | {"x": x}), switchgear.moe(**args))


@pytest.mark.parametrize("name", NAMES)
def test_sparse_tensors(name: str, backend: str) -> None:
    args = layer()
    for spoiled in (args[name].to_sparse(), args[name].float().to_mkldnn()):
        with raises(TypeError, name):
            switchgear.moe(**args | {name: spoiled})


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_tensors_in_stages(backend: str) -> None:
    x, ids = torch.randn(4, 8), torch.zeros(4, 2, dtype=torch.int32)
    for layout in (torch.sparse_coo, torch.sparse_csr):
        for call in (partial(switchgear.route, top_k=2), switchgear.glu, switchgear.MoE(8, 4, 4, 2)):
            with raises(TypeError):
                call(x.to_sparse(layout=layout))
        with raises(TypeError, "topk_ids"):
            switchgear.plan(ids.to_sparse(layout=layout), 3)


# ---- memory that another thread changes ------------------------------------------------------------------------------


@contextlib.contextmanager
def changing(indices: Tensor, seconds: float = 0.2) -> Iterator[Callable[[], bool]]:
    """Another thread makes indices invalid and valid again; yields whether it still does."""
    valid, invalid = indices.clone(), torch.full_like(indices, 2**30)
    end = time.monotonic() + seconds

    def goes_on() -> bool:
        return time.monotonic() < end

    def disturb() -> None:
        while goes_on():
            indices.copy_(invalid)
            indices.copy_(valid)

    thread = threading.Thread(target=disturb)
    thread.start()
    yield goes_on
    thread.join()


def test_ids_that_change_during_a_call() -> None:
    """The kernels never see an id that was not checked. Without a copy of the ids this writes out of bounds."""
    ids = torch.randint(0, 8, (20000, 4), dtype=torch.int32)
    with changing(ids) as goes_on:
        while goes_on():
            with contextlib.suppress(ValueError):
                assert switchgear.plan(ids, 8).expert_offsets[-1] <= ids.numel()


def test_slots_that_change_during_a_call() -> None:
    """The same for slots, which say where an expert's weights are."""
    num_experts = 2000
    slots = torch.zeros(num_experts, dtype=torch.int32)
    weight = switchgear.Weight("plain", torch.randn(1, 4, 4), 4, 4, torch.float32, slots=slots)
    ids = torch.arange(num_experts, dtype=torch.int32)[:, None]
    call = torch.randn(num_experts, 4), weight, weight, ids, torch.ones(num_experts, 1)
    valid = 0
    with changing(slots) as goes_on:
        while goes_on():
            with contextlib.suppress(ValueError):
                valid += switchgear.moe(*call, activation="relu", gated=False).isfinite().all()
    assert valid > 0


# ---- sizes and numbers -----------------------------------------------------------------------------------------------

HUGE = (2**31 - 1, 2**40, 2**63, 2**80, -(2**80))


@pytest.mark.parametrize("size", HUGE)
def test_huge_numbers_of_experts_allocate_nothing(size: int, backend: str) -> None:
    ids, logits = torch.zeros(4, 2, dtype=torch.int32), torch.randn(4, 8)
    with raises(ValueError, "num_experts"):
        switchgear.plan(ids, size)
    with raises(ValueError, "top_k"):
        switchgear.route(logits, size)
    with raises(ValueError, "num_groups"):
        switchgear.route(logits, 2, num_groups=size)


def test_limits_that_float32_does_not_have(backend: str) -> None:
    h = torch.randn(2, 4)
    assert not switchgear.glu(h, limit=2.0**-149).abs().gt(2.0**-149).any()
    for limit in (1e-50, 1e50):
        with raises(ValueError, "limit"):
            switchgear.glu(h, limit=limit)


WRONG_OPTIONS: tuple[tuple[str, Any], ...] = (
    *((name, value) for name in ("hidden_size", "intermediate_size", "num_experts") for value in (0, -1, 4.0, "4")),
    *(("top_k", value) for value in (0, 5, 1.5, "2", True)),
    *((f"{kind}_experts", value) for kind in ("null", "copy", "constant") for value in (-1, 1.0)),
    *((name, value) for name in ("shared_intermediate_size", "num_shared_experts") for value in (-1, 2.5)),
    *(("limit", value) for value in (-1.0, float("nan"), 1e-50)),
    ("alpha", float("nan")),
    ("alpha", "1"),
    ("scale", float("inf")),
    ("scale", float("nan")),
    *(("dtype", value) for value in ("bfloat16", torch.int32)),
    *((name, value) for name in ("score", "capacity") for value in (1.25, "linear")),
    *(("balance", value) for value in ([0.01], 0.01, ZLoss(0.1), "z")),
)


@pytest.mark.parametrize(("name", "value"), WRONG_OPTIONS)
def test_wrong_options_of_a_module(name: str, value: Any) -> None:
    options = {"hidden_size": 4, "intermediate_size": 4, "num_experts": 4, "top_k": 2, name: value}
    with raises((ValueError, TypeError), name):
        switchgear.MoE(**options)


def test_wrong_selections_and_context() -> None:
    with raises(TypeError, "select"):
        switchgear.MoE(4, 4, 4, select="topk")  # type: ignore[arg-type]
    with raises(TypeError, "select"):
        switchgear.MoE(4, 4, 4, select=lambda logits, context, bias: (logits, logits))(torch.randn(3, 4))
    with raises(TypeError, "score"):
        switchgear.MoE(4, 4, 4, 2, score=torch.nn.Linear(4, 4))
    with raises(TypeError, "dtype"):
        switchgear.Experts(4, 4, 4, dtype=torch.int32)
    with raises(TypeError, "token_id"):
        switchgear.MoE(4, 4, 4, 2)(torch.randn(3, 4), token_id=torch.ones(3))
    moe = switchgear.MoE(4, 4, 4, select=SkipBelow(TopK(2), 0.5, protect=0.5))
    for name in ("token_ids", "sequence_ids", "embedding", "importance"):
        with raises(TypeError, name):
            moe(torch.randn(3, 4), **{name: [0, 1, 2]})
    with raises(TypeError, "generator"):
        moe(torch.randn(3, 4), generator=3)
    for wrong in (1, 2, 4):
        with raises(ValueError, "importance"):
            moe(torch.randn(3, 4), importance=torch.ones(wrong))


WRONG_INPUTS: dict[str, Any] = {
    "another width": torch.randn(3, 5),
    "twice the width": torch.randn(3, 8),
    "no dimension": torch.tensor(1.0),
    "integers": torch.ones(3, 4, dtype=torch.int64),
    "float64": torch.randn(3, 4, dtype=torch.float64),
    "a list": [[1.0, 2.0, 3.0, 4.0]],
    "an array": np.zeros((3, 4), np.float32),
    "misaligned": torch.frombuffer(bytearray(49), dtype=torch.float32, offset=1).view(3, 4),
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_wrong_input_of_a_module(name: str) -> None:
    moe = switchgear.MoE(4, 4, 4, 2)
    for module in (moe, moe.gate):
        with raises((ValueError, TypeError), "hidden_states"):
            module(WRONG_INPUTS[name])


LAYERS: dict[str, Callable[[], dict[str, Any]]] = {
    "multi_head": presets.multi_head,
    "stratified": presets.stratified,
    "soft_moe": presets.soft_moe,
    "merged": presets.merged,
    "autonomy_of_experts": presets.autonomy_of_experts,
    "monet": partial(presets.monet, top_k=2),
}


@pytest.mark.parametrize(
    "wrong", [None, [[0.0] * 8], torch.zeros(2, 3, 9), torch.tensor(1.0)], ids=["None", "list", "width", "scalar"]
)
@pytest.mark.parametrize("name", LAYERS)
def test_wrong_input_of_a_composed_layer(name: str, wrong: Any) -> None:
    layer = presets.build(8, 4, 16, **LAYERS[name]())
    with raises((ValueError, TypeError), "hidden_states"):
        layer(wrong)
    assert layer(torch.zeros(2, 3, 8)).shape == (2, 3, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("name", ["multi_head", "stratified", "monet"])
def test_wrong_dtype_of_a_composed_layer(name: str, dtype: torch.dtype) -> None:
    layer = presets.build(8, 4, 16, **LAYERS[name]())
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    with raises(TypeError, "hidden_states"):
        layer(torch.ones(2, 3, 8, dtype=dtype))
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    if dtype.is_floating_point:
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.zeros(2, 3, 8, dtype=torch.bfloat16)).shape == (2, 3, 8)


@pytest.mark.parametrize("name", ["multi_head", "soft_moe"])
def test_a_layer_of_sequences_needs_two_dimensions(name: str) -> None:
    with raises(ValueError, "hidden_states"):
        presets.build(8, 4, 16, **LAYERS[name]())(torch.zeros(8))


def test_rows_of_another_dtype() -> None:
    """A router of float32 takes rows of bfloat16; the experts do not."""
    with raises(TypeError, "gate_up_proj"):
        switchgear.MoE(4, 4, 4, 2)(torch.randn(3, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize("num_sequences", [0, 2, -1])
def test_too_few_sequences(num_sequences: int) -> None:
    moe = switchgear.MoE(4, 4, 4, 2, capacity=Capacity(1.0, scope="sequence"))
    with raises(ValueError):
        moe(torch.randn(3, 4), sequence_ids=torch.tensor([0, 2, 1]), num_sequences=num_sequences)


@pytest.mark.parametrize("size", [2**40, 17, -32, 32.0])
def test_group_size(size: Any) -> None:
    with raises((ValueError, TypeError), "group_size"):
        Int4(group_size=size)


# ---- stored weights --------------------------------------------------------------------------------------------------


def test_parameters_beside_stored_weights_are_not_ignored() -> None:
    moe = switchgear.MoE(64, 64, 4, 2)
    switchgear.store(moe, "int8")
    x, weight = torch.randn(3, 64), torch.randn(4, 128, 64)
    with raises(ValueError, "gate_up_proj"):
        torch.func.functional_call(moe, {"experts.gate_up_proj": weight}, (x,))
    wanted = moe(x)
    assert torch.equal(torch.func.functional_call(moe, dict(moe.named_buffers()), (x,)), wanted)


def test_dtype_of_stored_weights(isa: str) -> None:
    moe = switchgear.MoE(64, 64, 4, 2, dtype=torch.bfloat16)
    switchgear.store(moe, "panels")
    with raises(TypeError, "gate_up_proj"):
        moe.float()(torch.randn(3, 64))
    moe.bfloat16()(torch.randn(3, 64, dtype=torch.bfloat16))


def test_weights_that_overlap_themselves(isa: str) -> None:
    """Rows a stride of 1 apart: the gradient has strides of its own."""
    args, memory = layer(), torch.randn(200)

    def gradients(copied: bool) -> list[Tensor]:
        views = [torch.as_strided(memory, args[name].shape, (1, 1, 1)) for name in ("gate_up_proj", "down_proj")]
        first, second = (
            (view.clone(memory_format=torch.contiguous_format) if copied else view).detach().requires_grad_()
            for view in views
        )
        y = switchgear.moe(args["x"], first, second, args["topk_ids"], args["topk_weights"])
        return list(torch.autograd.grad(y.sum(), (first, second)))

    for got, wanted in zip(gradients(copied=False), gradients(copied=True), strict=True):
        assert torch.equal(got, wanted)


def test_no_elements(backend: str) -> None:
    with raises(ValueError, "h"):
        switchgear.glu(torch.empty(0))


def test_indices_past_the_slots_in_use_are_not_read(backend: str) -> None:
    x, weight, offsets = torch.randn(2, 4), torch.randn(1, 3, 4), torch.tensor([0, 1], dtype=torch.int32)
    indices = torch.tensor([1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    out = switchgear.grouped_gemm(x, weight, offsets, token_indices=indices)
    assert not out[1:].any()
    assert torch.allclose(out[0], weight[0] @ x[1], atol=1e-5)
