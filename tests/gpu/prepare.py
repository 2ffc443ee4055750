# SPDX-License-Identifier: BSD-3-Clause
"""Before a card is rented: `make gpu STAGE=prepare`. What a run needs, its size and time, and all that needs no card.

    prepare.py [--wheels DIR]      also download the wheels to this folder, for a machine without a network
               [--sweep]           also compile the variants of the tunables, a minute of nvcc each

Prints the wheels that the run would install, with their sizes, and the time table; builds the C++ model of
conformance. On the machine with the card: PIP_NO_INDEX=1 PIP_FIND_LINKS=DIR make gpu.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import conformance, machine, sweep
from gpu.rehearse import time_table

NETWORK = 20e6  # bytes/s, for the printed estimate
BUILD_PACKAGES = ("scikit-build-core>=0.11", "pybind11>=3.0", "cmake>=3.26", "ninja")


def wanted() -> list[str]:
    """All packages of a run, whether this machine has them or not."""
    return sorted({"torch", *machine.PACKAGES.values(), *BUILD_PACKAGES, *machine.NVCC_WHEELS, machine.SANITIZER_WHEEL})


def resolved(packages: list[str], directory: Path) -> list[dict[str, Any]]:
    """What pip would install for them on a bare machine."""
    report = directory / "report.json"
    command = machine.pip("--quiet", "--dry-run", "--ignore-installed", "--report", str(report), *packages)
    subprocess.run(command, cwd=machine.ROOT, check=True)
    installs: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    return installs


def size_of(url: str) -> int | None:
    """Bytes of a file: of a local one, or as the server says."""
    import urllib.parse
    import urllib.request

    if url.startswith("file:"):
        return Path(urllib.parse.unquote(urllib.parse.urlparse(url).path)).stat().st_size
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=20) as answer:
            return int(answer.headers.get("Content-Length", 0)) or None
    except (OSError, ValueError):
        return None


def wheel_table(installs: list[dict[str, Any]]) -> tuple[str, int]:
    """(a line per wheel, all bytes)."""
    lines, total = [], 0
    for entry in sorted(installs, key=lambda entry: str(entry["metadata"]["name"]).lower()):
        size = size_of(entry["download_info"]["url"])
        total += size or 0
        text = f"{size / 1e6:10.1f} MB" if size else "   unknown   "
        lines.append(f"{text}  {entry['metadata']['name']} {entry['metadata']['version']}")
    return "\n".join(lines), total


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, metavar="DIR")
    parser.add_argument("--sweep", action="store_true", help="also compile the variants of the tunables")
    parser.add_argument("--no-model", action="store_true", help="do not build the model of conformance")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            text, total = wheel_table(resolved(wanted(), Path(scratch)))
            print(f"{text}\n{total / 1e9:10.2f} GB, {total / NETWORK:.0f} s at {NETWORK / 1e6:.0f} MB/s\n")
        except subprocess.CalledProcessError:
            print("pip could not resolve the packages (no network, or a wheel is missing)\n")
        print(time_table(Path(scratch)))
    missing = machine.missing()
    lines = ["missing here:", *(" ".join(command) for command in missing)] if missing else ["nothing is missing here"]
    print("\n".join(lines))
    status = 0
    if args.wheels is not None:
        command = machine.python("-m", "pip", "download", "--dest", str(args.wheels), *wanted())
        status = subprocess.run(command, cwd=machine.ROOT, check=False).returncode
    if args.sweep:
        status = sweep.main(["--objects-only"]) or status
    if not args.no_model:
        conformance.main(["--model-only"])
    return status


if __name__ == "__main__":
    sys.exit(main())
