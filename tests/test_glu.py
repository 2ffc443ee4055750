# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import switchgear
from errors import raises
from switchgear import ops, reference, testing
from switchgear.testing import GluOptions, assert_close, exact
from test_moe import OPTIONS

pytestmark = pytest.mark.in_turns

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)))
def test_glu(backend: str, options: GluOptions, dtype: torch.dtype) -> None:
    for rows, width in ((0, 6), (1, 2), (5, 38), (3, 130)):
        h = 3 * torch.randn(rows, width, dtype=torch.float64).to(dtype)
        if rows:
            h[0, :2] = 0
        a = ops.glu(h, *options)
        assert_close(a, testing.glu(exact(h), options).rounded(dtype))
        grad_a = torch.randn(a.shape, dtype=torch.float64).to(dtype)
        wanted = testing.glu_backward(exact(grad_a), h, options).rounded(dtype)
        assert_close(ops.glu_backward(grad_a, h, *options), wanted, "gradient of h")


def test_results_are_contiguous_as_a_graph_expects(backend: str) -> None:
    a = ops.glu(torch.randn(10, 8).t(), *GluOptions())
    assert a.shape == (8, 5)
    assert a.is_contiguous()


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_far_from_zero(backend: str, activation: str) -> None:
    """Results stay finite and correct where exponentials over- and underflow."""
    gate = torch.tensor([-1e4, -200.0, -88.5, -20.0, -1e-30, 1e-30, 20.0, 88.5, 200.0, 1e4])
    h = torch.stack((gate, torch.ones_like(gate)), -1).reshape(1, -1)
    options = GluOptions(activation, interleaved=True)
    assert_close(ops.glu(h, *options), testing.glu(exact(h), options).rounded(torch.float32))
    grad = ops.glu_backward(torch.ones(1, len(gate)), h, *options)
    assert grad.isfinite().all()
    torch.testing.assert_close(
        grad.double(),
        reference.glu_backward(torch.ones(1, len(gate)).double(), h.double(), *options),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_squares_of_gates_overflow(isa: str, activation: str) -> None:
    """Slopes are 0 and 1 where x², which some formulas contain, is infinite (torch's own gelu gives NaN there)."""
    h = torch.tensor([[-1e20, 1.0, 1e20, 1.0]])
    grad = ops.glu_backward(torch.ones(1, 2), h, *GluOptions(activation, interleaved=True))
    torch.testing.assert_close(grad[0, 0::2], torch.tensor([0.0, 1.0]), rtol=1e-6, atol=1e-6)


def test_huge_negative_gates_give_zero(isa: str) -> None:
    """However large up is: the sigmoid is 0, not the smallest float."""
    for dtype in DTYPES:
        huge = torch.tensor([-1e19, -300.0], dtype=torch.float64).clamp(min=torch.finfo(dtype).min).to(dtype)
        h = torch.cat((huge, torch.full_like(huge, torch.finfo(dtype).max)))[None]
        for activation in reference.ACTIVATIONS:
            assert not switchgear.glu(h, activation).any()
            grad = ops.glu_backward(torch.ones(1, 2, dtype=dtype), h, *GluOptions(activation))
            assert not grad.any()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swiglu_oai"])
def test_minus_infinity_gives_nan(backend: str, activation: str) -> None:
    h = torch.tensor([[-torch.inf, 1.0]])
    assert switchgear.glu(h, activation).isnan().all()


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="the processor flushes no subnormal numbers")
def test_flushing_does_not_depend_on_threads(isa: str) -> None:
    h = torch.full((4096, 512), 3e-38)  # enough rows for all threads
    h[:, 256:] = 0.25
    threads = torch.get_num_threads()
    flushed = []
    try:
        torch.set_num_threads(4)
        assert switchgear.glu(h).all()  # starts the other threads, in their own mode
        torch.set_flush_denormal(True)
        for count in (1, 4):
            torch.set_num_threads(count)
            flushed.append(switchgear.glu(h))
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    for a in flushed:
        assert not a.any()


def test_definitions() -> None:
    """The reference against torch's own functions, and Hugging Face's formulas of the clamped gates."""
    h = torch.randn(7, 12, dtype=torch.float64)
    gate, up = h[:, :6], h[:, 6:]
    glu = switchgear.glu
    torch.testing.assert_close(glu(h), F.silu(gate) * up)
    torch.testing.assert_close(glu(h, "gelu"), F.gelu(gate) * up)
    torch.testing.assert_close(glu(h, "gelu_tanh"), F.gelu(gate, approximate="tanh") * up)
    torch.testing.assert_close(glu(h, "relu"), F.relu(gate) * up)
    torch.testing.assert_close(glu(h, "relu2", gated=False), F.relu(h).square())
    torch.testing.assert_close(glu(h, "silu", interleaved=True), F.silu(h[:, 0::2]) * h[:, 1::2])
    torch.testing.assert_close(glu(h, limit=0.5), F.silu(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.5))
    clamped = gate.clamp(max=0.7)
    wanted = (up.clamp(-0.7, 0.7) + 1) * clamped * torch.sigmoid(1.702 * clamped)
    torch.testing.assert_close(glu(h, "swiglu_oai", limit=0.7), wanted)


def test_gradients_pass_within_a_limit_ends_included(backend: str) -> None:
    """Whatever torch does: the gradient of its own clamp is 1 at the ends up to 2.13, and 0 from 2.14 on."""
    past = 1.0 + 2.0**-23
    gate = torch.tensor([0.5, 1.0, past, 0.5, 0.5, 0.5, 0.5])
    up = torch.tensor([0.5, 0.5, 0.5, 1.0, -1.0, past, -past])
    h, ones = torch.cat((gate, up))[None], torch.ones(1, 7)
    within = torch.cat((gate <= 1, up.abs() <= 1))[None]
    grad = ops.glu_backward(ones, h, *GluOptions(limit=1.0))
    assert torch.equal(grad != 0, within)
    unlimited = ops.glu_backward(ones, h, *GluOptions())
    of_both_within = (within[:, :7] & within[:, 7:]).repeat(1, 2)
    assert torch.equal(grad[of_both_within], unlimited[of_both_within])


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)))
def test_gradcheck(options: GluOptions) -> None:
    h = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    keywords = {**options._asdict(), "limit": options.limit or None}
    assert torch.autograd.gradcheck(lambda h: switchgear.glu(h, **keywords), (h,))


def test_leading_dimensions(backend: str) -> None:
    h = torch.randn(2, 3, 8)
    assert torch.equal(switchgear.glu(h), switchgear.glu(h.view(6, 8)).view(2, 3, 4))
    assert torch.equal(switchgear.glu(h[0, 0]), switchgear.glu(h)[0, 0])


def test_errors(backend: str) -> None:
    with raises(ValueError):
        switchgear.glu(torch.zeros(2, 4), "tanh")
    with raises(ValueError, "swiglu_oai"):
        switchgear.glu(torch.zeros(2, 4), "swiglu_oai", gated=False)
    with raises(ValueError, "h"):
        switchgear.glu(torch.zeros(2, 5))
    with raises(TypeError):
        switchgear.glu(torch.zeros(2, 4, dtype=torch.int32))
