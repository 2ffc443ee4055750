# SPDX-License-Identifier: BSD-3-Clause
"""Checks a wheel: the oldest glibc it runs on, what its modules link, its files and its size.

    [SWITCHGEAR_CUDA=ON] python tests/release/check_wheel.py dist/*.whl [--glibc 2.28]

Needs readelf. --glibc makes a newer symbol an error: a wheel from a newer system runs on such systems alone. With
SWITCHGEAR_CUDA=ON, as for the build, the CUDA module must be there.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ALLOWED = {"libgomp.so.1", "libm.so.6", "libc.so.6", "libpthread.so.0", "librt.so.1", "libdl.so.2", "libgcc_s.so.1"}
LARGEST = 100 << 20  # of an upload, in bytes
CPP = (r"lib/cmake/switchgear/switchgear-config\.cmake", r"lib/libswitchgear_core\.a", r"include/switchgear/ops\.h")
WANTED = (r"__init__\.py", r"py\.typed", r"_C\.pyi", r"_C\..*\.so", *CPP)
WANTED_WITH_CUDA = (*WANTED, r"_cuda\..*\.so")
UNWANTED = re.compile(r"(^|/)(tests?|__pycache__|build)/|^(?!switchgear/(lib|include)/).*\.(o|a|cpp|h|cu|cuh|inl)$")


def readelf(module: Path, *options: str) -> str:
    return subprocess.run(["readelf", *options, str(module)], capture_output=True, text=True, check=True).stdout


def newest_glibc(module: Path) -> tuple[int, ...]:
    """The newest version of glibc whose symbols a module needs."""
    found = re.findall(r"GLIBC_(\d+(?:\.\d+)+)", readelf(module, "--version-info", "--wide"))
    return max(tuple(map(int, version.split("."))) for version in found)


def missing(names: list[str], wanted: tuple[str, ...]) -> list[str]:
    """The patterns of `wanted` that no file of the package matches."""
    return [pattern for pattern in wanted if not any(re.fullmatch(f"switchgear/{pattern}", name) for name in names)]


def problems(wheel: Path, glibc: tuple[int, ...] | None, wanted: tuple[str, ...] = WANTED) -> list[str]:
    found = []
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        found += [f"no file is switchgear/{pattern}" for pattern in missing(names, wanted)]
        found += [f"{name} does not belong in a wheel" for name in names if UNWANTED.search(name)]
        archive.extractall(folder)
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, {len(names)} files")
        for name in (name for name in names if name.endswith(".so")):
            module = Path(folder, name)
            dynamic = readelf(module, "--dynamic", "--wide")
            needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
            needs = newest_glibc(module)
            version = ".".join(map(str, needs))
            print(f"  {name}: {module.stat().st_size / 2**20:.1f} MiB, glibc {version}, {', '.join(sorted(needed))}")
            found += [f"{name} links {library}" for library in sorted(needed - ALLOWED) if "ld-linux" not in library]
            if "RPATH" in dynamic or "RUNPATH" in dynamic:
                found.append(f"{name} has a run path")
            if glibc is not None and needs > glibc:
                found.append(f"{name} needs glibc {version}")
        if wheel.stat().st_size > LARGEST:
            found.append("it is too large to upload")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, nargs="+")
    parser.add_argument("--glibc", type=lambda text: tuple(map(int, text.split("."))))
    args = parser.parse_args()
    wanted = WANTED_WITH_CUDA if os.environ.get("SWITCHGEAR_CUDA") == "ON" else WANTED
    failed = False
    for wheel in args.wheels:
        for problem in problems(wheel, args.glibc, wanted):
            print(f"  error: {problem}")
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
