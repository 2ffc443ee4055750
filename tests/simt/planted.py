# SPDX-License-Identifier: BSD-3-Clause
"""Runs everything that is planted, in two builds and three orders, and prints who saw what.

    planted.py asan=build/simt-asan race=build/simt-race

A plant must be seen (the program fails) in every order by the builds it names, and the same program must pass without it.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ORDERS = ["forward", "reverse", "random:1"]
SECONDS = 120


@dataclass
class Plant:
    name: str
    builds: list[str]
    clean: list[str]
    planted: list[str]


def plants_of(build: Path) -> list[Plant]:
    program = build / "tests/simt/simt_planted"
    listing = subprocess.run([program, "--list"], check=True, capture_output=True, text=True).stdout
    plants = []
    for line in listing.splitlines():
        name, builds = line.split()
        plants.append(Plant(name, builds.split(","), [str(program), name, "clean"], [str(program), name, "planted"]))
    for line in (build / "tests/simt/plants.txt").read_text().splitlines():
        name, builds, clean, planted = line.split()
        plants.append(Plant(name, builds.split(","), [clean], [planted]))
    return plants


def run(command: list[str], order: str) -> tuple[bool, str]:
    """Whether the program passes, and the line that says why not."""
    environment = {**os.environ, "SWITCHGEAR_SIMT_ORDER": order}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return False, f"no end after {SECONDS} s"
    return done.returncode == 0, message_of(done.stdout + done.stderr)


def message_of(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip() and not set(line) <= set("= ")]
    for line in lines:
        if "ERROR: AddressSanitizer" in line or "runtime error" in line:
            return line.partition("AddressSanitizer: ")[2] or line
    if lines and "conflicting access" in lines[0]:
        return " ".join(lines[1:2])
    return lines[0] if lines else ""


def main(arguments: list[str]) -> int:
    builds = {name: Path(path) for name, _, path in (argument.partition("=") for argument in arguments)}
    plants = {name: plants_of(path) for name, path in builds.items()}
    missed, false_alarms = [], []
    print(f"{'':42}" + "".join(f"{name:>8}" for name in builds) + "   message of the first build that must see it")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for rows in zip(*plants.values(), strict=True):
            cells, message = [], ""
            for name, plant in zip(builds, rows, strict=True):
                clean = list(pool.map(lambda order, plant=plant: run(plant.clean, order), ORDERS))
                planted = list(pool.map(lambda order, plant=plant: run(plant.planted, order), ORDERS))
                seen = sum(not passed for passed, _ in planted)
                required = name in plant.builds
                cells.append(f"{seen}/{len(ORDERS)}{'' if required else ' -'}")
                if required and seen < len(ORDERS):
                    missed.append(f"{plant.name} in {name}")
                if required and not message:
                    message = planted[0][1]
                false_alarms += [f"{plant.name} in {name}: {text}" for passed, text in clean if not passed]
            print(f"{rows[0].name:42}" + "".join(f"{cell:>8}" for cell in cells) + "   " + message[:110], flush=True)
    print(f"\n{len(next(iter(plants.values())))} plants; '-': that build need not see it")
    for what, found in {"MISSED": missed, "FALSE ALARM": false_alarms}.items():
        for line in found:
            print(f"{what}: {line}")
    return 1 if missed or false_alarms else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
