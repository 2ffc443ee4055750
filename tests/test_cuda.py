# SPDX-License-Identifier: BSD-3-Clause
"""CUDA on machines that may lack it: imports work without a driver, and requests for CUDA say what is missing.

Other tests check what the kernels compute: the shared ones (conftest.py says where they run).
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import switchgear
from errors import raises
from switchgear import cuda
from switchgear.cli import info, main
from switchgear.ops import native

HAS_MODULE = importlib.util.find_spec("switchgear._cuda") is not None
HAS_DEVICE = torch.cuda.is_available()
no_device = pytest.mark.skipif(HAS_DEVICE, reason="there is a CUDA device here")
needs_module = pytest.mark.skipif(not HAS_MODULE, reason="built without a CUDA module: no nvcc, or SWITCHGEAR_CUDA=OFF")


@pytest.fixture
def forget() -> Any:
    """Clears what cuda.py caches about this machine, before and after."""
    caches = (cuda._load, cuda.reason_against, native.cuda_kernels_of)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def fake_module(driver: int = 13000, archs: tuple[str, ...] = ("sm_80", "compute_80", "sm_90a")) -> Any:
    return SimpleNamespace(
        driver_version=lambda: driver, runtime_version=lambda: 13000, built_archs=lambda: list(archs),
        cuda_kernels=lambda: "sm_80",
    )  # fmt: skip


# ---- imports ---------------------------------------------------------------------------------------------------------


def test_importing_loads_no_cuda_module() -> None:
    """The module is large, and most processes do not need it."""
    code = "import sys, switchgear; print('switchgear._cuda' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@needs_module
@no_device
def test_the_module_imports_and_answers_without_a_device() -> None:
    module = cuda.module()
    assert module.device_count() == 0
    assert module.runtime_version() >= 12000
    assert module.driver_version() >= 0
    assert "sm_80" in module.built_archs()
    with raises(ValueError, "index"):
        module.device_info(0)


@needs_module
@no_device
def test_an_op_on_tensors_of_the_cpu_is_refused() -> None:
    module = cuda.module()
    execution = module.Execution(0, lambda size: torch.empty(size, dtype=torch.uint8))
    outputs = torch.full((3,), 7, dtype=torch.int32), torch.full((4,), 7, dtype=torch.int32)
    with pytest.raises((ValueError, RuntimeError)) as raised:
        module.plan(torch.zeros(2, 2, dtype=torch.int32), *outputs, torch.empty(2, 2, dtype=torch.int32), execution)
    assert "topk_ids" in str(raised.value) or "CUDA" in str(raised.value)
    assert all((output == 7).all() for output in outputs)


# ---- who asks --------------------------------------------------------------------------------------------------------


@no_device
def test_require_says_what_is_missing() -> None:
    with raises(RuntimeError, "switchgear"):
        cuda.require()


def test_require_without_a_module(forget: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(cuda.importlib, "import_module", load)
    for ask in (cuda.require, cuda.module):
        with raises(RuntimeError):
            ask()


def test_kernels_are_selected_in_the_module(forget: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    loaded = SimpleNamespace(cuda_kernels=lambda: "auto", set_cuda_kernels=asked.append)
    monkeypatch.setattr(cuda.importlib, "import_module", lambda name: loaded)
    switchgear.set_cuda_kernels("sm_80")
    assert (switchgear.cuda_kernels(), asked) == ("auto", ["sm_80"])


@pytest.mark.skipif(HAS_MODULE, reason="there is a CUDA module here")
def test_kernels_cannot_be_selected_without_a_module() -> None:
    with raises(RuntimeError):
        switchgear.set_cuda_kernels("sm_80")


def test_require_with_a_module_that_does_not_load(forget: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        raise ImportError("libsomething.so: cannot open shared object file")

    monkeypatch.setattr(cuda.importlib, "import_module", load)
    with raises(RuntimeError):
        cuda.require()


@pytest.mark.parametrize(
    ("driver", "says"), [(12080, "a driver for CUDA 13, that of .*H100.* is for 12.8"), (13000, None)]
)
def test_a_driver_of_an_older_major_version(
    forget: None, monkeypatch: pytest.MonkeyPatch, driver: int, says: str | None
) -> None:
    monkeypatch.setattr(cuda, "_load", lambda: (fake_module(driver), None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    reason = cuda.reason_against(0)
    assert reason is None if says is None else re.search(says, reason or "")


def test_rocm_is_not_cuda(forget: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_load", lambda: (SimpleNamespace(built_archs=lambda: ["sm_90"]), None))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))  # as torch says of a gfx90a
    assert "built for ROCm" in (cuda.reason_against(0) or "")


@pytest.mark.parametrize(
    ("torch_cuda", "driver", "message"),
    [
        (None, 13000, "switchgear"),
        ("13.0", 0, "switchgear"),
        ("13.0", 13000, "switchgear"),
    ],
)
def test_require_without_a_device(
    forget: None, monkeypatch: pytest.MonkeyPatch, torch_cuda: str | None, driver: int, message: str
) -> None:
    monkeypatch.setattr(cuda.importlib, "import_module", lambda name: fake_module(driver))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    with raises(RuntimeError, message):
        cuda.require()


@pytest.mark.parametrize(
    ("capability", "message"),
    [((7, 5), "switchgear"), ((12, 1), "switchgear"), ((9, 0), None)],
)
def test_require_with_a_device(
    forget: None, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], message: str | None
) -> None:
    monkeypatch.setattr(cuda.importlib, "import_module", lambda name: fake_module(archs=("sm_90a",)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
    if message is None:
        cuda.require()
    else:
        with raises(RuntimeError, message):
            cuda.require()


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("sm_80", (8, 0), True), ("sm_80", (8, 9), True), ("sm_80", (9, 0), False), ("sm_80", (7, 5), False),
        ("sm_89", (8, 6), False), ("compute_80", (8, 6), True), ("compute_80", (12, 0), True),
        ("compute_120", (10, 0), False), ("sm_90a", (9, 0), True), ("sm_90a", (10, 0), False),
        ("sm_100a", (10, 0), True), ("sm_100a", (10, 3), False), ("sm_100f", (10, 3), True),
        ("sm_100f", (12, 0), False), ("compute_90a", (10, 0), False), ("", (8, 0), False),
    ],
)  # fmt: skip
def test_has_code(archs: str, capability: tuple[int, int], runs: bool) -> None:
    assert cuda.has_code(archs.split(), capability) == runs


def test_this_build_has_code_for_everything_from_ampere_on() -> None:
    archs = [
        "sm_80",
        "compute_80",
        "sm_90a",
        "sm_100a",
        "sm_120",
        "compute_120",
    ]  # tests/test_cuda_build.py: the module has these
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)):
        assert cuda.has_code(archs, capability), capability


# ---- ops -------------------------------------------------------------------------------------------------------------


def test_use_backend_knows_no_cuda() -> None:
    """The device of the tensors decides, not the backend."""
    with raises(ValueError, "use_backend"):
        switchgear.use_backend("cuda").__enter__()


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_shapes_are_known_without_a_device(device: str) -> None:
    """Fake tensors replace tensors on an absent device, as in torch.compile and torch.export."""
    tokens, hidden, width, experts, top_k = 5, 16, 8, 4, 2
    with FakeTensorMode() if device == "cuda" else warnings.catch_warnings():
        x = torch.empty(tokens, hidden, device=device, dtype=torch.bfloat16)
        gate_up_proj = torch.empty(experts, 2 * width, hidden, device=device, dtype=torch.bfloat16)
        down_proj = torch.empty(experts, hidden, width, device=device, dtype=torch.bfloat16)
        routing = switchgear.route(torch.empty(tokens, experts, device=device), top_k=top_k)
        y = switchgear.moe(x, gate_up_proj, down_proj, routing.topk_ids, routing.topk_weights)
        plan = switchgear.plan(routing.topk_ids, experts)
        rows = switchgear.permute(x, plan)
    assert (y.shape, y.dtype, y.device.type) == (x.shape, torch.bfloat16, device)
    assert (rows.shape, rows.device.type) == ((tokens * top_k, hidden), device)
    assert plan.expert_offsets.shape == (experts + 1,)
    assert {tensor.device.type for tensor in (*routing[:2], *plan)} == {device}


def test_tensors_on_different_devices_are_named() -> None:
    with FakeTensorMode(), pytest.raises((ValueError, RuntimeError)) as raised:
        switchgear.moe(
            torch.empty(5, 16, device="cuda"), torch.empty(4, 16, 16), torch.empty(4, 16, 8, device="cuda"),
            torch.zeros(5, 2, device="cuda", dtype=torch.int32), torch.ones(5, 2, device="cuda"),
        )  # fmt: skip
    assert "gate_up_proj: expected a tensor on cuda:0 like x, got one on cpu" in str(raised.value)


# ---- commands --------------------------------------------------------------------------------------------------------


@no_device
def test_bench_on_cuda_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "cuda"]) == 2
    error = capsys.readouterr().err
    assert "switchgear bench cuda: switchgear: " in error
    assert "CUDA" in error


@no_device
def test_info_says_why_not() -> None:
    command = [sys.executable, "-m", "switchgear", "info", "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["backends"]["cuda"]
    assert found["available"] is False
    assert found["module"] is HAS_MODULE
    assert found["reason"]
    assert found["reason"] == ("switchgear" if HAS_MODULE else found["reason"])


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (None, "no CUDA device is visible"),
        (RuntimeError("cudaDriverGetVersion: the driver is too old"), "cudaDriverGetVersion: the driver is too old"),
    ],
)
def test_info_with_a_module_and_no_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failure: Exception | None, reason: str
) -> None:
    def driver_version() -> int:
        if failure is not None:
            raise failure
        return 0

    module = fake_module()
    module.device_count, module.driver_version, module.runtime_version = (lambda: 0), driver_version, (lambda: 13000)
    real = info.optional
    monkeypatch.setattr(info, "optional", lambda name: (module, "") if name == "switchgear._cuda" else real(name))
    monkeypatch.setenv("SWITCHGEAR_CUDA_KERNELS", "sm_80")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"no: {reason}" in text
    assert "sm_80 (SWITCHGEAR_CUDA_KERNELS)" in text
    assert "sm_80, compute_80, sm_90a" in text


# ---- multiprocessors left to others ----------------------------------------------------------------------------------


def test_multiprocessors_are_reserved_inside_and_also_on_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=0))
    execution = cuda.Execution(SimpleNamespace(Execution=lambda *arguments: arguments), 0)
    assert execution()[3] == 0
    with cuda.reserved_multiprocessors(20):
        with ThreadPoolExecutor(1) as pool:  # as autograd's
            assert pool.submit(execution).result()[3] == 20
        with pytest.raises(KeyError), cuda.reserved_multiprocessors(30):
            raise KeyError
        with cuda.reserved_multiprocessors(3):
            assert execution()[3] == 20  # the larger one
        assert execution()[3] == 20
    assert execution()[3] == 0
    first, second = cuda.reserved_multiprocessors(5), cuda.reserved_multiprocessors(4)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # not in the order of contexts: those of other threads
    assert execution()[3] == cuda.num_reserved() == 4
    second.__exit__(None, None, None)
    assert execution()[3] == 0


@pytest.mark.parametrize(
    ("count", "error"), [(-1, ValueError), (1 << 31, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_reserved_multiprocessors_names_a_bad_count(count: Any, error: type[Exception]) -> None:
    with raises(error, "count"), cuda.reserved_multiprocessors(count):
        pass
