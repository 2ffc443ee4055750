# SPDX-License-Identifier: BSD-3-Clause
"""Arrays of other libraries, as inputs and outputs through DLPack."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

import switchgear
from errors import raises
from switchgear.testing import Case, make_layer

CASE = Case("arrays", 7, 2, 4, 12, 6, "holes")


def test_numpy(backend: str) -> None:
    layer = make_layer(CASE, bias=True)
    x, gate_up, down, gate_up_bias, down_bias, ids, weights = (t.numpy() for t in layer)
    y = switchgear.moe(x, gate_up, down, ids, weights, gate_up_bias=gate_up_bias, down_bias=down_bias)
    assert isinstance(y, np.ndarray)
    wanted = switchgear.moe(*layer[:3], *layer[5:], gate_up_bias=layer.gate_up_bias, down_bias=layer.down_bias)
    assert np.array_equal(y, wanted.numpy())


def test_numpy_stages(backend: str) -> None:
    logits = np.random.default_rng(0).standard_normal((7, 4), dtype=np.float32)
    x = np.random.default_rng(1).standard_normal((7, 12), dtype=np.float32)
    weight = np.random.default_rng(2).standard_normal((4, 6, 12), dtype=np.float32)
    routing = switchgear.route(logits, 2)
    assert isinstance(routing, switchgear.Routing)
    assert isinstance(routing.topk_weights, np.ndarray)
    assert routing.num_experts == 4
    plan = switchgear.plan(routing.topk_ids.astype(np.int64), num_experts=4)
    assert all(isinstance(part, np.ndarray) for part in plan)
    permuted_x = switchgear.permute(x=x, plan=plan)
    h = switchgear.grouped_gemm(permuted_x, list(weight), plan.expert_offsets)
    assert np.array_equal(h, switchgear.grouped_gemm(x, weight, plan.expert_offsets, token_indices=plan.token_indices))
    y = switchgear.combine(switchgear.glu(h), plan, routing.topk_weights)
    assert y.shape == (7, 3)


def test_numpy_losses() -> None:
    logits = np.random.default_rng(0).standard_normal((7, 4), dtype=np.float32)
    ids = logits.argpartition(2)[:, 2:]
    wanted = switchgear.load_balancing_loss(torch.tensor(logits), torch.tensor(ids), torch.ones(7))
    assert np.array_equal(switchgear.load_balancing_loss(logits, ids, np.ones(7, np.float32)), wanted.numpy())
    assert np.array_equal(switchgear.z_loss(logits), switchgear.z_loss(torch.tensor(logits)).numpy())
    for loss in (lambda wrong: switchgear.load_balancing_loss(wrong, ids), switchgear.z_loss):
        with raises(TypeError, "router_logits"):
            loss(logits.tolist())
    with raises(TypeError, "topk_ids"):
        switchgear.load_balancing_loss(logits, ids.tolist())


class Foreign:
    """An array of a library that makes none from others."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


def test_a_library_that_makes_no_arrays_of_others() -> None:
    message = "h"
    with raises(TypeError, message):
        switchgear.glu(Foreign(torch.ones(2, 4)))  # type: ignore[arg-type]


def test_numpy_memory(backend: str) -> None:
    """Inputs are not copied, including read-only and strided arrays."""
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    strided = np.zeros((4, 12), dtype=np.float32)[:, ::2]
    strided[:] = x
    read_only = x.copy()
    read_only.flags.writeable = False
    wanted = switchgear.glu(x)
    assert np.array_equal(switchgear.glu(strided), wanted)
    assert np.array_equal(switchgear.glu(read_only), wanted)
    assert np.array_equal(switchgear.glu(np.empty((0, 6), dtype=np.float32)), np.empty((0, 3), dtype=np.float32))


def test_numpy_errors(backend: str) -> None:
    with raises(TypeError):
        switchgear.glu(np.zeros((2, 4), dtype=np.int32))
    with raises(TypeError, "h"):
        switchgear.glu([[1.0, 2.0]])
    with raises(TypeError, "x"):
        switchgear.moe()


def test_masks_are_not_ignored() -> None:
    masked = np.ma.masked_array(np.ones((2, 4), dtype=np.float32), mask=np.eye(2, 4))
    with raises(TypeError, "h"):
        switchgear.glu(masked)
    layer = make_layer(CASE)
    x, gate_up, down, ids, weights = (t.numpy() for t in (*layer[:3], *layer[5:]))
    with raises(TypeError, "topk_weights"):
        switchgear.moe(x, gate_up, down, ids, np.ma.masked_array(weights))


def test_a_library_that_only_speaks_dlpack(backend: str) -> None:
    """Only the protocol matters: a class with __dlpack__, and from_dlpack in its namespace."""

    class Namespace:
        @staticmethod
        def from_dlpack(tensor: Any) -> Array:
            return Array(torch.from_dlpack(tensor))

    class Array:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def __dlpack__(self, **keywords: Any) -> Any:
            return self.tensor.__dlpack__(**keywords)

        def __dlpack_device__(self) -> Any:
            return self.tensor.__dlpack_device__()

        def __array_namespace__(self) -> type[Namespace]:
            return Namespace

    h = torch.randn(3, 8)
    a = switchgear.glu(Array(h))
    assert isinstance(a, Array)
    assert torch.equal(a.tensor, switchgear.glu(h))


def test_an_array_without_values_is_named() -> None:
    tracer = type("Tracer", (), {"__dlpack__": None})()
    with raises(TypeError, "h"):
        switchgear.glu(tracer)


def test_a_dtype_without_kernels_is_named() -> None:
    with raises(TypeError, "h"):
        switchgear.glu(torch.randn(3, 8).to(torch.float8_e4m3fn))


def test_any_number_of_types_of_arrays() -> None:
    """Calls with arrays of types that were seen before keep nothing."""
    types = [type(f"Tensor{i}", (torch.Tensor,), {}) for i in range(40)]

    def references() -> int:
        for subclass in types:
            switchgear._C.advise_huge_pages(torch.zeros(4).as_subclass(subclass))
        return sys.getrefcount(torch.Tensor.untyped_storage)

    assert references() == references()


def test_jax() -> None:
    jnp = pytest.importorskip("jax.numpy", reason="jax is not installed")
    h = torch.randn(3, 8)
    a = switchgear.glu(jnp.asarray(h.numpy()))
    assert isinstance(a, type(jnp.zeros(1)))
    assert np.array_equal(np.asarray(a), switchgear.glu(h).numpy())
    low = switchgear.glu(jnp.asarray(h.numpy(), dtype=jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
