# SPDX-License-Identifier: BSD-3-Clause
"""The memory of large weight gradients: kept for the next one of equal size, bounded, else like any tensor's."""

from __future__ import annotations

import copy
import gc
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from errors import raises
from switchgear import _C, Experts

BYTES = 4 * 4 * 512 * 256  # of the gradient of down_proj; gate_up_proj's has twice as many


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    gc.collect()  # Gradients of earlier tests would count as live.
    _C.release_workspaces()
    yield
    _C.release_workspaces()


def make_experts(size: int = 512) -> Experts:
    return Experts(size, 256, num_experts=4)


def step(experts: Experts) -> None:
    x = torch.randn(8, experts.hidden_size)
    experts(x, torch.arange(16, dtype=torch.int32).view(8, 2) % 4, torch.ones(8, 2)).sum().backward()


def gradient(experts: Experts) -> Tensor:
    assert experts.down_proj.grad is not None
    return experts.down_proj.grad


def test_backward_hands_its_memory_on_without_a_copy() -> None:
    experts, seen = make_experts(), []
    experts.down_proj.register_hook(lambda grad: seen.append(grad.data_ptr()))
    step(experts)
    assert seen == [gradient(experts).data_ptr()]


@pytest.mark.parametrize("transposed", [False, True])
def test_dropped_gradients_lend_the_next_step_their_memory(transposed: bool) -> None:
    experts = Experts(512, 256, num_experts=4, transposed=transposed)
    places = set()
    for _ in range(4):
        step(experts)
        assert gradient(experts).stride() == experts.down_proj.stride()
        places.add(gradient(experts).data_ptr())
        experts.zero_grad()
    assert len(places) == 1


def test_memory_in_use_is_never_lent() -> None:
    experts = make_experts()
    step(experts)
    part, other = gradient(experts)[1, 3:5], gradient(experts).detach().numpy()
    before, other_before = part.clone(), other.copy()
    for _ in range(3):
        experts.zero_grad()
        step(experts)
    assert torch.equal(part, before)
    assert (other == other_before).all()


def test_gradients_accumulate_in_place_and_optimizers_step() -> None:
    torch.manual_seed(0)
    experts = make_experts()
    optimizer = torch.optim.AdamW(experts.parameters(), lr=1e-3)
    torch.manual_seed(1)
    step(experts)
    place, once = gradient(experts).data_ptr(), gradient(experts).clone()
    torch.manual_seed(1)
    step(experts)
    assert gradient(experts).data_ptr() == place
    assert torch.equal(gradient(experts), 2 * once)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    step(experts)
    assert gradient(experts).data_ptr() == place


def test_only_a_copy_can_be_resized() -> None:
    experts = make_experts()
    step(experts)
    with raises(RuntimeError):
        gradient(experts).untyped_storage().resize_(0)
    gradient(experts).clone().untyped_storage().resize_(0)


def test_idle_memory_is_bounded() -> None:
    """Idle plus live gradients never exceed the maximum that was live at once, for any sequence of sizes."""
    layers = [make_experts(size) for size in (512, 576, 640, 704, 768)]
    most = 3 * BYTES * 768 // 512
    for experts in (*layers, *reversed(layers)):
        step(experts)
        experts.zero_grad()
        assert _C.kept_bytes() <= most
    assert _C.kept_bytes() > 0


def test_release() -> None:
    experts = make_experts()
    step(experts)
    before = gradient(experts).clone()
    experts.gate_up_proj.grad = None
    assert _C.kept_bytes() >= 2 * BYTES
    _C.release_workspaces()
    assert _C.kept_bytes() == 0
    assert torch.equal(gradient(experts), before)
    experts.zero_grad()
    assert _C.kept_bytes() == BYTES


def test_a_gradient_is_a_tensor_as_any() -> None:
    experts = make_experts()
    step(experts)
    grad = gradient(experts)
    before = grad.clone()
    file = io.BytesIO()
    torch.save(grad, file)
    copies = [copy.deepcopy(grad), torch.load(io.BytesIO(file.getvalue()))]
    shared = grad.share_memory_()
    assert shared.is_shared()
    experts.zero_grad()
    for _ in range(2):
        step(experts)
    for tensor in (*copies, shared, grad):
        assert torch.equal(tensor, before)


def test_threads() -> None:
    """Gradients created in one thread and freed in another; every thread has its own memory."""

    def work(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        experts = make_experts()
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.fill_(0.01)
        kept = []
        for _ in range(5):
            x = torch.full((8, 512), float(seed))
            out = experts(x, torch.arange(16, dtype=torch.int32).view(8, 2) % 4, torch.ones(8, 2))
            out.sum().backward()
            kept.append(gradient(experts))
            experts.zero_grad()
        return kept

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(work, range(1, 9)))
    for grads in results:
        assert all(torch.equal(grad, grads[0]) for grad in grads)
    assert len({grad.data_ptr() for grads in results for grad in grads}) == 40


def test_fork() -> None:
    """A child continues with what its parent kept and holds; what it writes stays in the child."""
    experts, other = make_experts(), make_experts()
    step(experts)
    step(other)
    other.zero_grad()
    before = gradient(experts).clone()
    child = os.fork()
    if child == 0:
        try:
            experts.zero_grad()
            step(other)
            step(experts)
        finally:
            os._exit(0 if torch.isfinite(gradient(experts)).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(gradient(experts), before)


def test_interpreter_exits_with_gradients_alive() -> None:
    program = (
        "import test_kept_gradients as t, torch\n"
        "experts = t.make_experts(); t.step(experts); torch.alive = experts\n"
        "other = t.make_experts(); t.step(other); cycle = [other]; cycle.append(cycle)\n"
    )
    here = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run([sys.executable, "-c", program], cwd=here, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
