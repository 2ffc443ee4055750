# SPDX-License-Identifier: BSD-3-Clause
"""Plants the mistakes of faults.py in inline asm: planted.py BUILD [NAME…]. All must change the PTX, and be detected.

BUILD is a tree of the preset ptx, built. Each mistake is an edit of a copy of csrc. nvcc compiles one object again, and
it replaces the clean one in a test program, which must fail in some order of threads.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[3]
ORDERS = ("forward", "reverse", "random:1")
SECONDS = 120


@cache
def command_for(build: Path, target: str) -> str:
    listing = subprocess.run(
        ["ninja", "-C", str(build), "-t", "commands", "-s", target], check=True, capture_output=True, text=True
    )
    return listing.stdout.strip().splitlines()[-1]


def edited(text: str, fault: Fault) -> str:
    """The header with the mistake, in the wrapper or macro that the fault names."""
    is_macro = fault.function.startswith("define ")
    beginning = r"^#" if is_macro else r"^PTX \w+ "
    start = re.search(beginning + re.escape(fault.function) + r"\(", text, re.MULTILINE)
    if start is None:
        raise SystemExit(f"{fault.name}: no {fault.function} in {fault.header}")
    end = text.index("\n#" if is_macro else "\n}\n", start.start() + 1)
    body = text[start.start() : end]
    if fault.before not in body:
        raise SystemExit(f"{fault.name}: the text to replace is not in {fault.function}")
    return text[: start.start()] + body.replace(fault.before, fault.after, 1) + text[end:]


def ptx_of(object_file: Path) -> str:
    """The PTX in an object, without what tells lines."""
    data = object_file.read_bytes()
    start = data.index(b".version ")
    lines = data[start : data.index(b"\0", start)].decode().split("\n\t.section", 1)[0].splitlines()
    return "\n".join(line for line in lines if not re.match(r"\s*(\.loc|\.file|//)|\s*$", line))


def compile_object(build: Path, name: str, tree: Path) -> str | None:
    """nvcc's message if it refuses."""
    clean = f"tests/simt/nvcc/{name}.o"
    command = command_for(build, clean).replace(f"{ROOT}/csrc", f"{tree}/csrc")
    command = command.replace(str(build / clean), str(tree / "kernel.o"))
    done = subprocess.run(command, shell=True, cwd=build, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stdout + done.stderr).strip().splitlines()[0]


def link(build: Path, name: str, program: str, tree: Path) -> Path:
    words = shlex.split(command_for(build, f"tests/simt/{program}"))
    words = words[words.index("&&") + 1 : len(words) - words[::-1].index("&&") - 1] if "&&" in words else words
    clean, planted, target = f"tests/simt/nvcc/{name}.o", str(tree / "kernel.o"), tree / "program"
    if any(word.endswith(clean) for word in words):
        words = [planted if word.endswith(clean) else word for word in words]
    else:
        words.insert(words.index("-o"), planted)
    words[words.index("-o") + 1] = str(target)
    subprocess.run(words, cwd=build, check=True)
    return target


def run(build: Path, program: Path, fault: Fault, order: str) -> str | None:
    """What shows the mistake, or None."""
    command = [str(program), *fault.where[2].split()]
    if fault.where[1].startswith("ptx_conformance"):
        command = [
            sys.executable,
            str(Path(__file__).parent / "same_lines.py"),
            *command,
            str(build / "tools/gpu/simt_conformance"),
        ]
    variables = {**os.environ, "SWITCHGEAR_SIMT_ORDER": order}
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "does not end"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if not line.startswith("ok ")]
    thrown = [line for line in lines if line.startswith("what():")]
    return [*thrown, *lines, f"status {done.returncode}"][0][:150]


def plant(build: Path, fault: Fault) -> tuple[bool, str]:
    name, program, _ = fault.where
    tree = build / "planted" / re.sub(r"\W+", "_", fault.name)
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    header = tree / "csrc/cuda" / fault.header
    header.write_text(edited(header.read_text(), fault))
    if refusal := compile_object(build, name, tree):
        return False, f"nvcc refuses: {refusal}"
    if ptx_of(tree / "kernel.o") == ptx_of(build / f"tests/simt/nvcc/{name}.o"):
        return False, "nvcc makes the same PTX"
    planted = link(build, name, program, tree)
    for order in ORDERS:
        if said := run(build, planted, fault, order):
            shutil.rmtree(tree)
            return True, f"{order}: {said}"
    return False, "no order detects it"


def main() -> int:
    build, names = Path(sys.argv[1]).resolve(), sys.argv[2:]
    faults = [fault for fault in FAULTS if not names or fault.name in names]
    with ThreadPoolExecutor(int(os.environ.get("PLANTED_JOBS", "2"))) as pool:
        results = pool.map(lambda fault: plant(build, fault), faults)
        missed = 0
        for fault, (caught, said) in zip(faults, results, strict=True):
            missed += not caught
            print(f"{'caught' if caught else 'MISSED':7} {fault.name:45} {said}", flush=True)
    print(f"{len(faults)} mistakes in inline asm; {missed} missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
