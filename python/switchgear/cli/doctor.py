# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear doctor`: compares the kernels of each backend with float64, within derived bounds, and says what is slow
or missing here."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from switchgear import _C, cuda, functional, ops, testing
from switchgear.backends import backend, use_backend
from switchgear.integrations import is_too_old
from switchgear.modules import MoE
from switchgear.ops import GluOptions
from switchgear.utils.packages import first_line, installed_version, is_installed, missing_package
from switchgear.weights import store

from . import machine

ALLOCATOR = " ".join(f"{name}={value}" for name, value in machine.TUNED_ALLOCATOR.items())
CASE = testing.Case("doctor", num_tokens=37, top_k=2, num_experts=8, hidden_size=72, intermediate_size=40)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_SHARE = 0.7  # 0.85 to 1 on the processors measured (docs/performance.md)
RATE_TOLERANCE = 0.25  # of the table of bfloat16's rates
OPTIONS = GluOptions()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


@dataclass(frozen=True)
class Finding:
    """verdict: ok; slow: it works, and could be faster; absent: a part that does not run here; broken: wrong results,
    or a package that cannot be imported. remedy: what to do about it, or empty."""

    subject: str
    verdict: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        indent = " " * 28
        lines = textwrap.wrap(self.text, 92)
        lines += textwrap.wrap(f"-> {self.remedy}", 92, subsequent_indent="   ") if self.remedy else []
        return f"{self.verdict:<8}{self.subject:<20}" + f"\n{indent}".join(lines or [""])


def diagnose() -> Iterator[Finding]:
    """All findings, each as soon as it is known. Takes some ten seconds."""
    chosen = backend()
    with use_backend("native"):
        yield from examine_cpu()
        yield from examine_cuda()
        yield from examine_settings(chosen)
        yield measure_speed()


def run(args: argparse.Namespace) -> int:
    findings = []
    for finding in diagnose():
        findings.append(finding)
        if not args.json:
            print(finding, flush=True)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    broken = (finding.subject for finding in findings if finding.verdict == "broken")
    return int(any(subject.startswith(("CPU", "CUDA")) for subject in broken))


# ---- kernels ---------------------------------------------------------------------------------------------------------


def _compare_layer(dtype: torch.dtype, device: str) -> None:
    """Raises AssertionError where a result is out of bounds."""
    layer = testing.make_layer(CASE, dtype)
    wanted, _ = testing.moe_forward(layer, OPTIONS)
    here = layer._replace(**{name: t.to(device) for name, t in layer._asdict().items() if t is not None})
    y, h = ops.moe_forward(*here.arguments(), *OPTIONS, True)
    testing.assert_close(y.cpu(), wanted, "y")
    grad_y = torch.randn_like(layer.x)
    gradients = testing.moe_backward(grad_y, h.cpu(), layer, OPTIONS)
    tensors = [t.detach().requires_grad_() for t in (here.x, here.gate_up_proj, here.down_proj, here.topk_weights)]
    x, gate_up_proj, down_proj, topk_weights = tensors
    y = functional.moe(x, gate_up_proj, down_proj, here.topk_ids, topk_weights)
    torch.autograd.backward(y, grad_y.to(device))
    wanted_of = (gradients[0], gradients[1], gradients[2], gradients[5])
    for name, tensor, bound in zip(("x", "gate_up_proj", "down_proj", "topk_weights"), tensors, wanted_of, strict=True):
        assert tensor.grad is not None
        testing.assert_close(tensor.grad.cpu(), bound, f"gradient of {name}")


def _compare(subject: str, device: str, text: str) -> Finding:
    names, wrong = [str(dtype).removeprefix("torch.") for dtype in DTYPES], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, dtype in zip(names, DTYPES, strict=True):
            try:
                _compare_layer(dtype, device)
            except Exception as error:  # whatever a broken installation raises is the finding
                wrong.append(f"{name}: {type(error).__name__}: {error}")
    if wrong:
        return Finding(subject, "broken", "; ".join(wrong), "report it with the output of switchgear info --json")
    return Finding(subject, "ok", f"{text}: forward and backward agree with float64 in {', '.join(names)}")


def examine_cpu() -> Iterator[Finding]:
    """One finding per instruction set that runs here."""
    chosen, available = _C.cpu_isa(), _C.available_cpu_isas()
    try:
        for isa in available:
            ops.set_cpu_isa(isa)
            yield _compare(f"CPU, {isa}", "cpu", "in use" if isa == chosen else "available")
        if "avx512bf16" in available:
            ops.set_cpu_isa("avx512bf16")
            rate = _C.fma_rate("bfloat16", 1) / _C.fma_rate("float32", 1)
            yield examine_bf16_rate(rate, _C.processor(), available)
    finally:
        ops.set_cpu_isa(chosen)
    best = _C.best_cpu_isa(available, _C.bf16_rate(*_C.processor()))
    if chosen != best:
        remedy = "unset SWITCHGEAR_CPU_ISA, or call switchgear.set_cpu_isa"
        yield Finding("instruction set", "slow", f"{chosen} is in use, {best} is the default here", remedy)
    missing = [isa for isa in ("avx2", "avx512", "avx512bf16", "amx") if isa not in _C.build_info()["isas"]]
    if missing and "avx2" in available:
        yield Finding("instruction set", "slow", f"built without {', '.join(missing)}", "build with a newer compiler")


def examine_bf16_rate(rate: float, processor: tuple[str, int, int], available: list[str]) -> Finding:
    """Whether the measured rate contradicts the table that chooses the instruction set: no timing does."""
    listed = _C.bf16_rate(*processor)
    chosen, better = (_C.best_cpu_isa(available, of) for of in (listed, rate))
    text = f"vdpbf16ps has {rate:.2f} times the multiply-adds of float32, {listed:g} times in the table of processors"
    if chosen == better or abs(rate / listed - 1) <= RATE_TOLERANCE:
        return Finding("bfloat16", "ok", text)
    return Finding("bfloat16", "slow", text, f"set SWITCHGEAR_CPU_ISA={better}, and report {processor}")


def examine_cuda() -> Iterator[Finding]:
    """One finding per device, or why there is none."""
    try:
        cuda.require()
    except RuntimeError as error:
        yield Finding("CUDA", "absent", str(error).removeprefix("switchgear: "))
        return
    for index in range(torch.cuda.device_count()):
        reason = cuda.reason_against(index)
        name = torch.cuda.get_device_name(index)
        if reason is None:
            yield _compare(f"CUDA, {index}", f"cuda:{index}", name)
        else:
            yield Finding(f"CUDA, {index}", "slow", f"ops run on the reference: {reason}")


def measure_speed() -> Finding:
    """Times decoding of a token with weights from memory, in turns with a plain read of as many bytes."""
    num_experts, top_k, width = 64, 8, 1024
    moe = MoE(width, width, num_experts, top_k, dtype=torch.bfloat16).eval().requires_grad_(False)
    store(moe, "plain")
    weights = [parameter.detach() for parameter in moe.experts.parameters()]
    groups = torch.arange(num_experts, dtype=torch.int32).view(-1, 1, top_k)  # a round uses each expert once
    topk_weights = torch.full((1, top_k), 1 / top_k)
    x = torch.randn(1, width, dtype=torch.bfloat16)
    reads, layers, nbytes = [], [], 0
    for turn in range(0, 80, 2):
        to_read, to_run = groups[turn % len(groups)], groups[(turn + 1) % len(groups)]
        parts = [weight[expert] for expert in to_read[0].tolist() for weight in weights]
        nbytes = sum(part.nbytes for part in parts)
        begin = time.perf_counter()
        _C.read(parts, torch.get_num_threads())
        middle = time.perf_counter()
        functional.moe(x, weights[0], weights[1], to_run, topk_weights)
        reads.append(middle - begin)
        layers.append(time.perf_counter() - middle)
    read, layer = statistics.median(reads), statistics.median(layers)
    text = (
        f"decoding a token takes {layer * 1e3:.2f} ms for {nbytes / 1e6:.0f} MB of weights, at {read / layer:.0%} of "
        f"the rate of a plain read ({nbytes / read / 1e9:.0f} GB/s)"
    )
    if read / layer < LEAST_SHARE:
        return Finding("speed", "slow", text, "follow the remedies above, and stop other programs")
    return Finding("speed", "ok", text)


# ---- settings of the machine and of this process ---------------------------------------------------------------------


def examine_settings(backend: str) -> Iterator[Finding]:
    """One finding per setting. backend: the one that ops run on."""
    if backend == "reference":
        yield Finding("backend", "slow", "all ops run on the reference, in plain torch", "unset SWITCHGEAR_BACKEND")
    yield _examine_huge_pages(machine.transparent_huge_pages())
    yield _examine_threads(torch.get_num_threads(), machine.cpu()["cores"], machine.cpu_quota())
    yield _examine_load(os.getloadavg()[0], os.environ.get("OMP_WAIT_POLICY"))
    yield _examine_openmp(machine.openmp_runtimes())
    yield _examine_allocator(os.environ)
    yield _examine_transformers()


def _examine_huge_pages(setting: str | None) -> Finding:
    if setting == "never":
        remedy = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled; store() then moves weights there"
        text = "turned off: reading weights misses the TLB at each page of 4 KB"
        return Finding("huge pages", "slow", text, remedy)
    if setting is None:
        return Finding("huge pages", "absent", "this system does not say whether it has them")
    how = "for memory that asks: that of store() and of our layers" if setting == "madvise" else "for all memory"
    return Finding("huge pages", "ok", f"{setting}: {how}")


def _examine_threads(threads: int, cores: int, quota: float | None) -> Finding:
    granted = cores if quota is None else min(cores, quota)
    limit = f" of which the control group grants {quota:g}" if quota is not None and quota < cores else ""
    text = f"torch uses {threads}; the process may run on {cores} cores{limit}"
    if threads > granted:
        remedy = f"torch.set_num_threads({max(int(granted), 1)}) or OMP_NUM_THREADS: more threads wait for each other"
        return Finding("threads", "slow", text, remedy)
    if threads < granted:
        return Finding("threads", "slow", text, f"torch.set_num_threads({int(granted)}) if the rest is free")
    return Finding("threads", "ok", text)


def _examine_load(load: float, policy: str | None) -> Finding:
    waits = f"OMP_WAIT_POLICY={policy}" if policy else "OMP_WAIT_POLICY is not set"
    return Finding("load", "ok", f"{load:.1f} threads ran or waited for a core in the last minute; {waits}")


def _examine_openmp(runtimes: list[str]) -> Finding:
    if len(runtimes) > 1:
        text = f"{len(runtimes)} are loaded: {', '.join(runtimes)}. Their threads compete for the same cores"
        return Finding("OpenMP runtimes", "slow", text, "import torch first, or remove the package that brings its own")
    return Finding("OpenMP runtimes", "ok", runtimes[0] if runtimes else "none found in this process")


def _examine_allocator(environment: os._Environ[str] | dict[str, str]) -> Finding:
    preloaded = environment.get("LD_PRELOAD", "")
    if any(name in preloaded for name in ("jemalloc", "tcmalloc", "mimalloc")):
        return Finding("allocator", "ok", preloaded)
    if "MALLOC_TRIM_THRESHOLD_" in environment:
        return Finding("allocator", "ok", "glibc keeps the memory of large tensors")
    text = "glibc returns large tensors to the system, so torch's own faults pages anew at each training step"
    return Finding("allocator", "slow", text, f"only for training: start Python with {ALLOCATOR}")


def _examine_transformers() -> Finding:
    version = installed_version("transformers")
    if version is None and not is_installed("transformers"):
        remedy = "pip install 'switchgear[transformers]' to run its models"
        return Finding("transformers", "absent", "not installed", remedy)
    version = version or "unknown version"
    try:
        importlib.import_module("switchgear.integrations.transformers")
    except Exception as error:  # a broken installation can raise anything
        return Finding("transformers", "broken", f"{version}: {first_line(error)}", _advise(version, error))
    return Finding("transformers", "ok", f'{version}: experts_implementation="switchgear" is registered')


def _advise(version: str, error: Exception) -> str:
    if is_too_old(version):
        return "pip install 'switchgear[transformers]'"
    if missing := missing_package(error):
        return f"install {missing}"
    return "pip install --force-reinstall transformers"
