# SPDX-License-Identifier: BSD-3-Clause
"""Runs all planted bugs in two builds and three orders of threads (or SIMT_ORDERS), PLANTED_JOBS at a time (one per
processor if not set); prints which builds detect them.

    planted.py asan=build/simt-asan race=build/simt-race [--only TEXT]

Each argument is a build tree of tests/simt in which the target simt_plants is built. --only runs the plants whose names
contain the text. Small programs have mistakes that can be switched on (planted/*.cpp). Mistakes in the real kernels
(planted/kernels.py) are edits of a copy of csrc/cuda, of which one file is compiled again and linked in place of the
clean one. The builds that a mistake names must detect it in every order (the program fails), and the same program must
pass without it. Mistakes that only the text or the PTX shows are in test_sources.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent / "planted"))

from kernels import MISTAKES, Mistake  # noqa: E402
from stored import STORED  # noqa: E402

ORDERS = os.environ.get("SIMT_ORDERS", "").split() or ("forward", "reverse", "random:1")
SECONDS = 120


@dataclass(frozen=True)
class Plant:
    name: str
    builds: tuple[str, ...]
    clean: list[str]
    planted: Callable[[], list[str]]  # builds the program


def own_plants(build: Path) -> list[Plant]:
    program = str(build / "tests/simt/simt_planted")
    listing = subprocess.run([program, "--list"], check=True, capture_output=True, text=True).stdout
    plants = []
    for line in listing.splitlines():
        name, builds = line.split()
        command = [program, name, "planted"]
        plants.append(Plant(name, tuple(builds.split(",")), [program, name, "clean"], lambda command=command: command))
    return plants


# ---- the real kernels -----------------------------------------------------------------------------------------------


@cache
def link_command(build: Path, program: str) -> tuple[str, ...]:
    ninja = ["ninja", "-C", str(build), "-t", "commands", "-s", f"tests/simt/{program}"]
    output = subprocess.run(ninja, check=True, capture_output=True, text=True).stdout
    command = next(line for line in reversed(output.splitlines()) if f"-o tests/simt/{program}" in line)
    return tuple(shlex.split(command.removeprefix(": && ").removesuffix(" && :")))


@cache
def compilations(build: Path) -> list[tuple[str, list[str]]]:
    """The sources and commands of tests/simt. A source may belong to the library of kernels and to a program too."""
    entries = json.loads((build / "compile_commands.json").read_text())
    ours = [entry for entry in entries if "tests/simt" in entry["output"]]
    return [(_name_of(Path(entry["file"]), build), shlex.split(entry["command"])) for entry in ours]


def _name_of(file: Path, build: Path) -> str:
    """From the root; a file that CMake writes into the build tree has the same name from there."""
    return str(file.relative_to(build if file.is_relative_to(build) else ROOT))


def compilation(build: Path, source: str, link: list[str]) -> tuple[list[str], str]:
    """The command that compiles the source, for that program if it does, and the object that it makes."""
    commands = [list(command) for file, command in compilations(build) if file == source]
    objects = [command[command.index("-o") + 1] for command in commands]
    i = next((i for i, made in enumerate(objects) if made in link), 0)
    return commands[i], objects[i]


def build_mistake(build: Path, mistake: Mistake) -> list[str]:
    """Compiles the source against a copy of the kernels with the mistake, and links the program with it."""
    home = build / "tests/simt/mistakes" / "".join(c if c.isalnum() else "_" for c in mistake.name)
    kernels = home / "csrc/cuda"
    shutil.copytree(ROOT / "csrc/cuda", kernels, dirs_exist_ok=True)
    text = (kernels / mistake.header).read_text()
    if text.count(mistake.before) != 1:
        raise SystemExit(
            f"{mistake.name}: expected its text once in {mistake.header}, got {text.count(mistake.before)}"
        )
    (kernels / mistake.header).write_text(text.replace(mistake.before, mistake.after))
    source = kernels / Path(mistake.source).name if mistake.source.startswith("csrc") else ROOT / mistake.source
    if not source.exists():
        source = build / mistake.source

    link = list(link_command(build, mistake.program))
    result, program = home / "mistake.o", home / mistake.program
    command, clean = compilation(build, mistake.source, link)
    command[command.index("-o") + 1] = str(result)
    command[command.index("-c") + 1] = str(source)
    without = {"-MD"}
    drop = [command.index(flag) for flag in ("-MT", "-MF") if flag in command]
    command = [w for i, w in enumerate(command) if w not in without and i not in drop and i - 1 not in drop]
    first = next(i for i, word in enumerate(command) if word.startswith("-"))  # after a launcher and the compiler
    command[first:first] = [f"-I{kernels}", f"-I{home / 'csrc'}"]
    subprocess.run([*command, "-w"], cwd=build, check=True)

    link[link.index("-o") + 1] = str(program)
    if clean in link:
        link[link.index(clean)] = str(result)
    else:  # a library member, which the linker then ignores
        link.insert(link.index("-o"), str(result))
    subprocess.run(link, cwd=build, check=True)
    return [str(program), *mistake.tests]


def kernel_plants(build: Path) -> list[Plant]:
    def plant(mistake: Mistake) -> Plant:
        clean = [str(build / "tests/simt" / mistake.program), *mistake.tests]
        return Plant(mistake.name, mistake.builds, clean, lambda: build_mistake(build, mistake))

    return [plant(mistake) for mistake in (*MISTAKES, *STORED)]


# ---- running --------------------------------------------------------------------------------------------------------


def run(command: list[str], order: str) -> tuple[bool, str]:
    """Whether the program passes, and the line that gives the reason if not."""
    environment = {**os.environ, "SWITCHGEAR_SIMT_ORDER": order, "SWITCHGEAR_FAIL_FAST": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return False, f"no end after {SECONDS} s"
    message = message_of(done.stdout + done.stderr)
    if not message and done.returncode < 0:
        message = f"killed by {signal.Signals(-done.returncode).name}"
    return done.returncode == 0, message


def message_of(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip() and not set(line) <= set("= ")]
    for line in lines:
        if "ERROR: AddressSanitizer" in line or "runtime error" in line:
            return line.partition("AddressSanitizer: ")[2] or line
    lines = [line for line in lines if not line.startswith("ok ")]
    for i, line in enumerate(lines):
        if "conflicting access" in line and i + 1 < len(lines):
            return lines[i + 1]
    return lines[0] if lines else ""


@dataclass
class Cell:
    clean: list[tuple[bool, str]]
    planted: list[tuple[bool, str]]


def examine(plant: Plant, build: str, clean: Callable[[tuple[str, ...]], list[tuple[bool, str]]]) -> Cell | None:
    if build not in plant.builds:
        return None
    try:
        command = plant.planted()
    except subprocess.CalledProcessError:
        return Cell([], [(True, "does not compile")])
    return Cell(clean(tuple(plant.clean)), [run(command, order) for order in ORDERS])


def chosen(name: str, texts: list[str] | None) -> bool:
    return texts is None or any(text in name for text in texts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", nargs="+", metavar="KIND=TREE")
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="run plants whose names contain this; repeatable"
    )
    options = parser.parse_args()
    builds = {name: Path(path).resolve() for name, _, path in (build.partition("=") for build in options.builds)}
    plants = {
        name: [plant for plant in own_plants(path) + kernel_plants(path) if chosen(plant.name, options.only)]
        for name, path in builds.items()
    }
    names = [plant.name for plant in next(iter(plants.values()))]
    if not names:
        parser.error(f"--only: no plant's name contains any of {options.only}")
    clean = cache(lambda command: [run(list(command), order) for order in ORDERS])
    missed, false_alarms = [], []
    print(f"{'':50}" + "".join(f"{name:>8}" for name in builds) + "   what the first of them says")
    with ThreadPoolExecutor(int(os.environ.get("PLANTED_JOBS", "0")) or os.cpu_count()) as pool:
        # a plant in all builds before the next one, so that lines appear while others run
        rows = [
            {name: pool.submit(examine, plants[name][i], name, clean) for name in builds} for i in range(len(names))
        ]
        for plant_name, row in zip(names, rows, strict=True):
            cells, message = [], ""
            for name, future in row.items():
                cell = future.result()
                if cell is None:
                    cells.append("-")
                    continue
                seen = sum(not passed for passed, _ in cell.planted)
                cells.append(f"{seen}/{len(ORDERS)}")
                if seen < len(ORDERS):
                    missed.append(f"{plant_name} in {name}")
                message = message or cell.planted[0][1]
                false_alarms += [f"{plant_name} in {name}: {text}" for passed, text in cell.clean if not passed]
            print(f"{plant_name:50}" + "".join(f"{cell:>8}" for cell in cells) + "   " + message[:110], flush=True)
    print(f"\n{len(names)} plants; '-': not for that build to see")
    for what, found in {"MISSED": missed, "FALSE ALARM": false_alarms}.items():
        for line in found:
            print(f"{what}: {line}")
    return 1 if missed or false_alarms else 0


if __name__ == "__main__":
    sys.exit(main())
