# SPDX-License-Identifier: BSD-3-Clause
"""Before a card is rented: `make gpu STAGE=prepare`. What a run needs, its times, and all that needs no card.

    prepare.py [--wheels DIR]      also download the wheels to this folder, for a machine without a network
               [--sweep]           also compile the variants of the tunables, a minute of nvcc each

Prints the time table and what is missing here, and builds the C++ model of conformance. On the machine with the card:
PIP_NO_INDEX=1 PIP_FIND_LINKS=DIR make gpu.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import conformance, machine, steps, sweep
from gpu.report import table

BUILD_PACKAGES = ("scikit-build-core>=0.11", "pybind11>=3.0", "cmake>=3.26", "ninja")


def list_packages() -> list[str]:
    """All packages of a run, whether this machine has them or not."""
    return sorted({"torch", *machine.PACKAGES.values(), *BUILD_PACKAGES, *machine.NVCC_WHEELS, machine.SANITIZER_WHEEL})


def time_table() -> str:
    rows: list[tuple[object, ...]] = []
    for stage in (1, 2, 3):
        of_stage = [step for step in steps.steps(Path()) if step.stage == stage]
        rows += [(stage, step.name, step.assumed, f"{step.limit:.0f}", step.why) for step in of_stage]
        rows.append((stage, "**all**", sum(step.assumed for step in of_stage),
                     f"{sum(step.limit for step in of_stage):.0f}", f"at most {steps.STAGE_SECONDS}"))  # fmt: skip
    return table(("stage", "step", "assumed s", "limit s", "assumption"), rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, metavar="DIR")
    parser.add_argument("--sweep", action="store_true", help="also compile the variants of the tunables")
    parser.add_argument("--no-model", action="store_true", help="do not build the model of conformance")
    args = parser.parse_args(arguments)
    print(time_table())
    missing = machine.missing()
    lines = ["missing here:", *(" ".join(command) for command in missing)] if missing else ["nothing is missing here"]
    print("\n".join(lines))
    status = 0
    if args.wheels is not None:
        command = machine.python("-m", "pip", "download", "--dest", str(args.wheels), *list_packages())
        status = subprocess.run(command, cwd=machine.ROOT, check=False).returncode
    if args.sweep:
        status = sweep.main(["--objects-only"]) or status
    if not args.no_model:
        conformance.main(["--model-only"])
    return status


if __name__ == "__main__":
    sys.exit(main())
