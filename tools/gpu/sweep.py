# SPDX-License-Identifier: BSD-3-Clause
"""Variants of the tunables of the Hopper GEMM: copies of csrc/cuda with another constant, built into a program each.

    sweep.py [--build DIR] [--objects-only]

Builds DIR/NAME for every variant: only gemm_sm90.cu is compiled again, for about a minute, everything else comes from
the module's build tree. --objects-only compiles, beforehand and without a card, what takes long. On the card, each
program times the same products (sweep.cu). The list is made from the sources, so it follows the kernels.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"


@dataclass(frozen=True)
class Variant:
    name: str
    file: str = ""  # in csrc/cuda
    before: str = ""  # occurs in it exactly once
    after: str = ""

    def text(self) -> str:
        """The edited file. ValueError if the sources no longer have its text."""
        source = (SOURCES / self.file).read_text()
        if source.count(self.before) != 1:
            raise ValueError(
                f"{self.name}: expected {self.before!r} once in {self.file}, got {source.count(self.before)}"
            )
        return source.replace(self.before, self.after)


def constants(file: str, pattern: str, what: str, values: tuple[int, ...]) -> list[Variant]:
    """A variant for each other value of a constant; `pattern` has its digits as the only group."""
    text = (SOURCES / file).read_text()
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{what}: {pattern!r} is not in {file}")
    start, end = found.start(1) - found.start(), found.end(1) - found.start()
    return [Variant(f"{what}-{value}", file, found[0], f"{found[0][:start]}{value}{found[0][end:]}")
            for value in values if value != int(found[1])]  # fmt: skip


TILES = "tiles_sm90.h"
ROW = re.compile(r"\{(\w+), (\w+), (\d+), (\d+)((?:, [\w |]+)*)\}")  # of kTiles: rows per expert, n, stages, …


def rows_of_table() -> list[re.Match[str]]:
    text = (SOURCES / TILES).read_text()
    start = text.find(" kTiles[] = {")
    if start < 0:
        raise ValueError(f"kTiles is not in {TILES}")
    return list(ROW.finditer(text, start, text.index("};", start)))


def variants() -> list[Variant]:
    """The kernels as they are; fewer stages in rows of few slots and of pairs; other limits for few slots; cooperative
    pairs in place of ping-pong; pairs from other numbers of rows on; other bands. 16 of them: one on each core."""
    found = [Variant("as-is")]
    for index, row in enumerate(rows_of_table()):
        least, most, n, stages, rest = row[1], row[2], int(row[3]), int(row[4]), row[5]
        changed: dict[str, tuple[str, int, str]] = {}
        if most.isdigit():
            changed[f"stages{stages // 2}"] = (most, stages // 2, rest)
            changed |= {f"most{limit}": (str(limit), stages, rest) for limit in (2 * int(most), int(most) // 2)}
        elif rest.startswith(", 2, "):
            changed[f"stages{stages - 1}"] = (most, stages - 1, rest)
            if "false" in rest and "kGluBackward" not in rest:  # which would spill
                changed["cooperative"] = (most, stages, rest.replace("false", "true"))
        for what, (limit, count, others) in changed.items():
            after = f"{{{least}, {limit}, {n}, {count}{others}}}"
            found.append(Variant(f"row{index}-n{n}-{what}", TILES, row[0], after))
    found += constants(TILES, r"kPairs = (\d+);", "pairs", (128, 256, 512))
    found += constants("tiles_sm80.h", r"kBand = (\d+);", "band", (4, 8, 16, 32))
    return found


# ---- building --------------------------------------------------------------------------------------------------------

FLAGS = (
    "-O3",
    "-std=c++20",
    "--generate-code=arch=compute_90a,code=sm_90a",
    f"-I{ROOT / 'include'}",
    f"-I{ROOT / 'csrc'}",
)


def compile_command(variant: Variant, home: Path) -> list[str]:
    """nvcc's command for the variant's GEMM; its copy of csrc/cuda comes first among the includes."""
    source = (home / "csrc" / "cuda" if variant.file else SOURCES) / "gemm_sm90.cu"
    own = [f"-I{home / 'csrc' / 'cuda'}", f"-I{home / 'csrc'}"] if variant.file else []
    return ["nvcc", *own, *FLAGS, f"-I{SOURCES}", "-c", str(source), "-o", str(home / "gemm_sm90.o")]


def link_command(home: Path, main: Path, module: Path, program: Path) -> list[str]:
    """The variant's object comes before the library, whose own is then not taken."""
    libraries = [str(module / "csrc" / "cuda" / "libswitchgear_cuda.a"), str(module / "libswitchgear_core.a")]
    return ["nvcc", str(main), str(home / "gemm_sm90.o"), *libraries, "-Xcompiler=-fopenmp", "-o", str(program)]


def is_current(made: Path) -> bool:
    return made.exists() and made.stat().st_mtime > max(path.stat().st_mtime for path in SOURCES.iterdir())


def build_one(variant: Variant, build: Path, main: Path, module: Path | None) -> str:
    """Returns what went wrong, or ''. Without a module, only the variant's object is made."""
    home = build / f"{variant.name}.objects"
    home.mkdir(parents=True, exist_ok=True)
    if variant.file:
        shutil.copytree(SOURCES, home / "csrc" / "cuda", dirs_exist_ok=True)
        (home / "csrc" / "cuda" / variant.file).write_text(variant.text())
        for other in ("cpu", "rounding.h"):  # included by a path relative to csrc/cuda
            link = home / "csrc" / other
            if not link.exists():
                link.symlink_to(ROOT / "csrc" / other)
    commands = [] if is_current(home / "gemm_sm90.o") else [compile_command(variant, home)]
    if module is not None:
        commands.append(link_command(home, main, module, build / variant.name))
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return f"{variant.name}: {done.stderr.strip()[-300:]}"
    return ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu" / "sweep", metavar="DIR")
    parser.add_argument("--module", type=Path, default=ROOT / "build" / "gpu-module", metavar="DIR",
                        help="the build tree of the module")  # fmt: skip
    parser.add_argument("--objects-only", action="store_true", help="do not link: the module is not built yet")
    args = parser.parse_args(arguments)
    chosen = variants()
    args.build.mkdir(parents=True, exist_ok=True)
    main_object = args.build / "sweep.o"
    module = None if args.objects_only else args.module
    subprocess.run(["nvcc", *FLAGS, "-c", str(ROOT / "tools/gpu/sweep.cu"), "-o", str(main_object)], check=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wrong = list(pool.map(lambda variant: build_one(variant, args.build, main_object, module), chosen))
    print("\n".join(text for text in wrong if text) or f"{len(chosen)} variants")
    return 1 if any(wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
