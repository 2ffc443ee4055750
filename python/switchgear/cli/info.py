# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear info`: what is installed, what runs here, and why something does not."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from switchgear import _C

from ..cuda import NO_MODULE
from ..utils.packages import installed_version
from . import machine
from .common import CommandError, optional


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--cmake-dir", action="store_true", help="print the folder of the CMake package, for C++ projects"
    )


def _describe_cuda() -> dict[str, Any]:
    module, reason = optional("switchgear._cuda")
    if module is None:
        missing = "No module named" in reason or "cannot import name" in reason
        return {"available": False, "module": False, "reason": NO_MODULE if missing else reason}
    info: dict[str, Any] = {"module": True, "archs": list(module.built_archs()), "kernels": module.cuda_kernels()}
    try:
        count = module.device_count()
        info |= {"driver": module.driver_version(), "runtime": module.runtime_version()}
        info["devices"] = [module.device_info(i) for i in range(count)]
        info |= {"available": count > 0} | ({} if count else {"reason": "no CUDA device is visible"})
    except Exception as error:  # no driver, or one older than the runtime: the module raises its own error
        info |= {"available": False, "devices": [], "reason": str(error)}
    return info


def collect() -> dict[str, Any]:
    processor = _C.processor()
    cpu_backend: dict[str, Any] = {
        "isas_available": _C.available_cpu_isas(),
        "processor": processor,
        "bf16_rate": _C.bf16_rate(*processor),
        "isa": _C.cpu_isa(),
        "build": dict(_C.build_info()),
    }
    cuda_backend = _describe_cuda()
    runtimes = machine.openmp_runtimes()
    warnings = []
    if len(runtimes) > 1:
        warnings.append(
            f"{len(runtimes)} OpenMP runtimes are loaded: their thread pools compete for the same cores. "
            "Import torch before other packages, or remove the package that brings its own copy."
        )
    return {
        "versions": {
            "switchgear": installed_version("switchgear"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": installed_version("transformers"),
            "compiler": cpu_backend["build"]["compiler"],
        },
        "platform": platform.platform(),
        "cpu": machine.cpu(),
        "gpus": machine.gpus(),
        "backends": {"cpu": cpu_backend, "cuda": cuda_backend},
        "threads": {
            "torch": torch.get_num_threads(),
            "openmp_runtimes": runtimes,
        },
        "environment": machine.environment(),
        "warnings": warnings,
    }


def _list_rows(info: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(section, [(name, value)]), in printing order."""
    cpu, cpu_backend, cuda_backend = info["cpu"], info["backends"]["cpu"], info["backends"]["cuda"]
    l3 = f"{cpu['l3_bytes'] / 2**20:.0f} MiB" if cpu["l3_bytes"] else "unknown"
    forced = info["environment"].get("SWITCHGEAR_CPU_ISA")
    build = {key: value for key, value in cpu_backend["build"].items() if key not in ("compiler", "cuda")}
    native = [("native CPU", cpu_backend["isa"] + (" (SWITCHGEAR_CPU_ISA)" if forced else ""))]
    native += [("ISAs that run here", ", ".join(cpu_backend["isas_available"]))]
    if "avx512bf16" in cpu_backend["isas_available"]:
        native += [("vdpbf16ps", f"{cpu_backend['bf16_rate']:g} times the multiply-adds of float32, by processor")]
    native += [(f"build: {key}", _format(value)) for key, value in build.items()]
    if cuda_backend["available"]:
        names = ", ".join(str(device.get("name", device)) for device in cuda_backend["devices"])
        cuda = f"yes: {names}; driver {cuda_backend['driver']}, runtime {cuda_backend['runtime']}"
    else:
        cuda = f"no: {cuda_backend['reason']}"
    native += [("CUDA", cuda)]
    if cuda_backend["module"]:
        native += [("CUDA archs", ", ".join(cuda_backend["archs"]))]
        named = info["environment"].get("SWITCHGEAR_CUDA_KERNELS")
        native += [("CUDA kernels", cuda_backend["kernels"] + (" (SWITCHGEAR_CUDA_KERNELS)" if named else ""))]
    return [
        ("versions", [(name, value or "not installed") for name, value in info["versions"].items()]),
        ("machine", [
            ("platform", info["platform"]),
            ("CPU", f"{cpu['model']}, {cpu['cores']} usable cores, L3 {l3}"),
            ("CPU features", " ".join(cpu["features"]) or "unknown"),
            ("memory", f"{cpu['memory_bytes'] / 2**30:.1f} GiB" if cpu["memory_bytes"] else "unknown"),
            ("huge pages", cpu["transparent_huge_pages"] or "unknown"),
            ("GPU", ", ".join(f"{g['name']} ({g['capability']})" for g in info["gpus"]) or "none that torch can use"),
        ]),
        ("backends", native),
        ("threads", [
            ("torch", str(info["threads"]["torch"])),
            ("OpenMP runtimes", "\n".join(info["threads"]["openmp_runtimes"]) or "none found"),
        ]),
        ("environment", list(info["environment"].items())),
    ]  # fmt: skip


def _format(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _find_cmake_package() -> Path:
    folder = Path(_C.__file__).parent / "lib/cmake/switchgear"
    if not folder.is_dir():
        raise CommandError(f"{folder} does not exist: only installed packages have the C++ library")
    return folder


def run(args: argparse.Namespace) -> int:
    if args.cmake_dir:
        print(_find_cmake_package())
        return 0
    info = collect()
    if args.json:
        print(json.dumps(info, indent=2, default=str))
        return 0
    for section, rows in _list_rows(info):
        if rows:
            print(section)
        for name, value in rows:
            first, *more = value.split("\n")
            print(f"  {name:<20} {first}")
            for line in more:
                print(f"  {'':<20} {line}")
    for warning in info["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    return 0
