# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear doctor` finds what is wrong, and says nothing is where nothing is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import switchgear
from switchgear import _C, ops
from switchgear.cli import doctor, machine, main


def test_every_instruction_set_is_ok() -> None:
    before = switchgear.cpu_isa()
    found = [finding for finding in doctor.examine_cpu() if finding.subject.startswith("CPU")]
    assert [finding.subject for finding in found] == [f"CPU, {isa}" for isa in switchgear.available_cpu_isas()]
    assert {finding.verdict for finding in found} == {"ok"}
    assert switchgear.cpu_isa() == before


ISAS = ["generic", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"]


@pytest.mark.parametrize(
    ("vendor", "family", "model", "isa"),
    [
        ("AuthenticAMD", 25, 17, "avx512bf16"),
        ("AuthenticAMD", 26, 2, "avx512bf16"),
        ("GenuineIntel", 6, 143, "avx512vnni"),
        ("GenuineIntel", 6, 207, "avx512vnni"),
        ("GenuineIntel", 6, 85, "avx512bf16"),  # not listed
        ("AuthenticAMD", 6, 143, "avx512bf16"),
        ("", 0, 0, "avx512bf16"),
    ],
)
def test_the_processor_chooses_the_instruction_set(vendor: str, family: int, model: int, isa: str) -> None:
    rate = _C.bf16_rate(vendor, family, model)
    assert _C.best_cpu_isa(ISAS[:-1], rate) == isa
    for last in (1, 4, 6):  # only avx512bf16 is passed over
        assert _C.best_cpu_isa(ISAS[:last], rate) == ISAS[last - 1]
    assert _C.best_cpu_isa(ISAS[:-1], 1.0) == "avx512vnni"


@pytest.mark.parametrize(
    ("rate", "model", "isas", "remedy"),
    [
        (0.5, 143, ISAS[:-1], ""),
        (0.6, 143, ISAS[:-1], ""),
        (2.0, 143, ISAS[:-1], "SWITCHGEAR_CPU_ISA=avx512bf16"),
        (0.9, 85, ISAS[:-1], "SWITCHGEAR_CPU_ISA=avx512vnni"),
        (1.1, 85, ISAS[:-1], ""),  # wrong, but on the same side
        (2.0, 143, ISAS, ""),  # bfloat16 is multiplied by tiles
    ],
)
def test_a_wrong_rate_of_the_table(rate: float, model: int, isas: list[str], remedy: str) -> None:
    found = doctor.examine_bf16_rate(rate, ("GenuineIntel", 6, model), isas)
    assert found.verdict == ("slow" if remedy else "ok")
    assert remedy in found.remedy


def test_wrong_results_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.moe_forward

    def wrong(*args: Any) -> Any:
        y, h = right(*args)
        return y * 1.1, h

    monkeypatch.setattr(ops, "moe_forward", wrong)
    finding = doctor._compare("CPU", "cpu", "")
    assert finding.verdict == "broken"
    assert "y: " in finding.text
    assert "switchgear info" in finding.remedy


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    speed = doctor.Finding("speed", "slow", "not timed here", "wait")
    monkeypatch.setattr("switchgear.cli.doctor.measure_speed", lambda: speed)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"CUDA", "huge pages", "threads", "OpenMP runtimes", "allocator"} <= {row["subject"] for row in found}
    assert main(["doctor"]) == 0
    assert "-> wait" in capsys.readouterr().out


@pytest.mark.parametrize(("subject", "status"), [("CPU, avx2", 1), ("CUDA, 0", 1), ("transformers", 0)])
def test_only_broken_backends_fail(subject: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchgear.cli.doctor.diagnose", lambda: [doctor.Finding(subject, "broken", "")])
    assert main(["doctor"]) == status


def test_the_reference_is_named_as_what_is_slow(backend: str) -> None:
    """The kernels are checked whatever ops run on."""
    found = {finding.subject: finding for finding in doctor.examine_settings(switchgear.backend())}
    assert ("backend" in found) == (backend == "reference")
    if backend == "reference":
        assert found["backend"].remedy == "unset SWITCHGEAR_BACKEND"


def test_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "installed_version", lambda _: None)
        patch.setattr(doctor, "is_installed", lambda _: False)
        assert doctor._examine_transformers().verdict == "absent"
        patch.setattr(doctor, "is_installed", lambda _: True)  # a source tree has no version
        patch.setitem(sys.modules, "switchgear.integrations.transformers", None)
        assert doctor._examine_transformers().text.startswith("unknown version: ModuleNotFoundError: ")
    monkeypatch.setitem(sys.modules, "switchgear.integrations.transformers", None)
    monkeypatch.setattr(doctor, "installed_version", lambda _: "5.24.0")
    found = doctor._examine_transformers()
    assert found.verdict == "broken"
    assert found.text.startswith("5.24.0: ModuleNotFoundError: ")
    missing = ModuleNotFoundError("No module named 'safetensors'", name="safetensors")
    for version in ("4.57.1", "5.19.0"):
        assert doctor._advise(version, missing) == "pip install 'switchgear[transformers]'"
    assert doctor._advise("5.24.0", missing) == "install safetensors"
    assert doctor._advise("5.24.0", RuntimeError("wrong ABI")) == "pip install --force-reinstall transformers"


def test_huge_pages() -> None:
    assert doctor._examine_huge_pages("never").verdict == "slow"
    assert {doctor._examine_huge_pages(how).verdict for how in ("madvise", "always")} == {"ok"}
    assert doctor._examine_huge_pages(None).verdict == "absent"


def test_threads() -> None:
    assert doctor._examine_threads(8, 8, None).verdict == "ok"
    assert "set_num_threads(4)" in doctor._examine_threads(8, 8, 4.0).remedy
    assert "set_num_threads(8)" in doctor._examine_threads(1, 8, None).remedy
    assert "set_num_threads(1)" in doctor._examine_threads(2, 8, 0.5).remedy


def test_quota_of_the_control_group(tmp_path: Path) -> None:
    assert machine.cpu_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("150000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert machine.cpu_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    assert machine.cpu_quota(tmp_path) == 2


def test_a_second_openmp_runtime() -> None:
    assert doctor._examine_openmp(machine.openmp_runtimes("")).verdict == "ok"
    assert doctor._examine_openmp(["/a/libgomp.so.1", "/b/libomp.so"]).verdict == "slow"


def test_allocator() -> None:
    assert doctor._examine_allocator({}).verdict == "slow"
    assert doctor._examine_allocator({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}).verdict == "ok"
    assert doctor._examine_allocator({"MALLOC_TRIM_THRESHOLD_": "1"}).verdict == "ok"
