# SPDX-License-Identifier: BSD-3-Clause
"""Compiles mutants of the core and of the CPU kernels, and expects the C++ tests to fail on each.

    python tests/mutants.py [--count 240] [--seed 1] [--jobs 2] [--part 1/8] [part of a file's name …]

The sources are not modified: a copy with one edit is compiled and linked before the library into the tests of its file
(FILES). Edits are the mistakes of cpp/planted/mistakes.py and those that mutations.py makes up. A mutant that passes
its tests runs them again under the address sanitizer, and survives if it passes those too. Mutants do not count that do
not compile, that have the code of the sources, or that mutants.txt lists, since no test could detect them. It is an
error if a mistake survives, or more than 10 % of all mutants (without --part). The build trees are build/mutants and
build/mutants-asan.
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
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "cpp/planted")]

from mistakes import MISTAKES, Mistake  # noqa: E402

from mutations import Equivalent, Mutation, mutations, read_ledger, selection  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc"
LEDGER = Path(__file__).with_suffix(".txt")
GOAL = 0.9


@dataclass(frozen=True)
class Covered:
    """What is compiled again if a file changes, and the programs that test it, with parts of the names of tests."""

    units: str  # in csrc, or in that folder of the build, without .cpp
    programs: str  # "moe slots:gradients"
    isa: str = "generic"


KERNELS, INTEGERS = "cpu/kernels_generic", "cpu/integers_generic"
FILES = {
    "checks.cpp": Covered("checks", "checks checks_options slots"),
    "ops.cpp": Covered("ops", "checks checks_options gate permute glu slots grouped_gemm attention adapters"),
    "reader.cpp": Covered("reader", "reader"),
    "weight_checks.cpp": Covered("weight_checks", "checks checks_weights panels slots minifloat groups integers"),
    "cpu/adapter.cpp": Covered("cpu/adapter", "adapters"),
    "cpu/adapter.h": Covered("cpu/adapter cpu/moe_forward cpu/moe_backward cpu/token_sum", "adapters"),
    "cpu/assign_balanced.cpp": Covered("cpu/assign_balanced", "policies:assign_balanced"),
    "cpu/assign_capped.cpp": Covered("cpu/assign_capped", "policies:assign_capped"),
    "cpu/attention.cpp": Covered("cpu/attention", "attention:attend"),
    "cpu/encode.cpp": Covered("cpu/encode", "encode"),
    "cpu/encode_blocks.inl": Covered("cpu/encoders_generic", "encode"),
    "cpu/encode_rows.inl": Covered("cpu/encoders_generic", "encode"),
    "cpu/encoders.h": Covered("cpu/encode cpu/encoders_generic", "encode"),
    "cpu/gguf_blocks.h": Covered("cpu/gguf_generic", "gguf slots"),
    "cpu/gguf_dots.inl": Covered("cpu/gguf_avx512vnni", "gguf slots", "avx512vnni"),
    "cpu/gguf_kernels.h": Covered("cpu/gguf_generic", "gguf slots"),
    "cpu/gguf_kernels.inl": Covered("cpu/gguf_generic", "gguf slots"),
    "cpu/gguf_lanes.inl": Covered("cpu/gguf_generic", "gguf slots"),
    "cpu/gguf_rows.inl": Covered("cpu/gguf_generic", "gguf slots"),
    "cpu/attention.inl": Covered(KERNELS, "attention:attend"),
    "cpu/backend.cpp": Covered("cpu/backend", "backends gate permute threads:settings"),
    "cpu/column_topk.cpp": Covered("cpu/column_topk", "policies:column_topk"),
    "cpu/compact.cpp": Covered("cpu/compact", "compact"),
    "cpu/compact.h": Covered(f"cpu/compact {KERNELS}", "compact"),
    "cpu/compact_products.inl": Covered(KERNELS, "compact"),
    "cpu/compact_record.h": Covered(f"cpu/compact {KERNELS}", "compact"),
    "cpu/decoded_columns.cpp": Covered("cpu/decoded_columns", "adapters minifloat integers"),
    "cpu/decoded_columns.h": Covered(
        "cpu/decoded_columns cpu/moe_backward cpu/token_sum cpu/transposed_gemm", "adapters minifloat integers"
    ),
    "cpu/dot_products.inl": Covered(KERNELS, "grouped_gemm gate reads"),
    "cpu/exp.h": Covered("cpu/rows_generic", "route"),
    "cpu/experts.h": Covered(
        "cpu/moe_forward cpu/grouped_gemm cpu/gate", "gate grouped_gemm moe panels compact groups"
    ),
    "cpu/fit_capacity.cpp": Covered("cpu/fit_capacity", "policies:fit_capacity"),
    "cpu/float_mode.h": Covered("cpu/threads", "threads:float_mode"),
    "cpu/gate.cpp": Covered("cpu/gate", "gate"),
    "cpu/gate_columns.h": Covered("cpu/glu cpu/moe_forward cpu/moe_backward", "glu moe"),
    "cpu/glu.cpp": Covered("cpu/glu", "glu"),
    "cpu/group_decoders.h": Covered("cpu/kernels_avx512", "groups", "avx512"),
    "cpu/grouped_gemm.cpp": Covered("cpu/grouped_gemm", "grouped_gemm minifloat compact integers"),
    "cpu/grouping.h": Covered("cpu/column_topk cpu/fit_capacity", "policies:column_topk policies:fit_capacity"),
    "cpu/kernels.inl": Covered(KERNELS, "permute glu grouped_gemm gate reads"),
    "cpu/layer_rows.h": Covered("cpu/moe_forward", "moe:forward panels"),
    "cpu/log.h": Covered("cpu/assign_capped", "policies:assign_capped"),
    "cpu/minifloat_decoders.h": Covered("cpu/kernels_avx512", "minifloat", "avx512"),
    "cpu/minifloat_values.h": Covered("cpu/encoders_avx512 cpu/kernels_avx512", "encode minifloat", "avx512"),
    "cpu/minifloat_products.inl": Covered(KERNELS, "minifloat groups"),
    "cpu/moe_backward.cpp": Covered("cpu/moe_backward", "moe:backward slots:gradients adapters"),
    "cpu/moe_forward.cpp": Covered("cpu/moe_forward", "moe:forward slots panels minifloat"),
    "cpu/multiply.inl": Covered(KERNELS, "grouped_gemm moe"),
    "cpu/norms.cpp": Covered("cpu/norms", "attention"),
    "cpu/packed_products.inl": Covered("cpu/kernels_avx2", "moe:any_batch", "avx2"),
    "cpu/panel_products.inl": Covered("cpu/kernels_avx2", "panels moe:any_batch", "avx2"),
    "cpu/permute.cpp": Covered("cpu/permute", "permute"),
    "cpu/plan.cpp": Covered("cpu/plan", "plan"),
    "cpu/ranking.h": Covered("cpu/column_topk cpu/fit_capacity cpu/route cpu/route_dynamic", "policies route"),
    "cpu/route.cpp": Covered("cpu/route", "route"),
    "cpu/route_dynamic.cpp": Covered("cpu/route_dynamic", "policies:route_dynamic"),
    "cpu/rows.inl": Covered("cpu/rows_avx512", "route policies", "avx512"),
    "cpu/scores.h": Covered("cpu/route cpu/assign_balanced cpu/assign_capped cpu/route_dynamic", "route policies"),
    "cpu/simd_avx2.h": Covered("cpu/kernels_avx2", "permute glu grouped_gemm reads", "avx2"),
    "cpu/simd_avx512.h": Covered("cpu/kernels_avx512bf16", "permute glu grouped_gemm", "avx512bf16"),
    "cpu/simd_generic.h": Covered(KERNELS, "permute glu grouped_gemm"),
    "cpu/simulation.cpp": Covered("cpu/simulation", "simulation"),
    "cpu/simulation.h": Covered("cpu/simulation", "simulation"),
    "cpu/slot_rows.h": Covered("cpu/adapter cpu/moe_forward cpu/moe_backward", "adapters"),
    "cpu/slots.h": Covered("cpu/moe_forward cpu/moe_backward cpu/integers/moe_forward", "slots"),
    "cpu/stored_columns.inl": Covered(KERNELS, "integers minifloat"),
    "cpu/threads.cpp": Covered("cpu/threads", "threads:number threads permute"),
    "cpu/threads.h": Covered("cpu/permute cpu/plan cpu/grouped_gemm", "permute plan grouped_gemm"),
    "cpu/timeline.h": Covered("cpu/simulation cpu/plan", "simulation"),
    "cpu/token_sum.cpp": Covered("cpu/token_sum", "moe slots"),
    "cpu/transposed_gemm.cpp": Covered("cpu/transposed_gemm", "minifloat integers grouped_gemm"),
    "cpu/weight_gradient.cpp": Covered("cpu/weight_gradient", "grouped_gemm:wgrad moe:backward"),
    "cpu/weight_gradient.inl": Covered(KERNELS, "grouped_gemm:wgrad moe:backward"),
    "cpu/widen.h": Covered(INTEGERS, "integers"),
    "cpu/wide_product.h": Covered("cpu/moe_backward cpu/token_sum", "moe"),
    "cpu/workspace.h": Covered("cpu/workspace cpu/moe_forward cpu/moe_backward cpu/gate", "moe gate workspace"),
    "cpu/workspace.cpp": Covered("cpu/workspace", "workspace moe threads:concurrent"),
    "cpu/worker_pool.h": Covered("cpu/worker_pool", "threads"),
    "cpu/worker_pool.cpp": Covered("cpu/worker_pool", "threads"),
    "cpu/integers/dot.h": Covered(INTEGERS, "integers"),
    "cpu/integers/experts.h": Covered("cpu/integers/rows cpu/integers/moe_forward", "integers"),
    "cpu/integers/grouped_gemm.cpp": Covered("cpu/integers/grouped_gemm", "integers"),
    "cpu/integers/kernels.inl": Covered(INTEGERS, "integers"),
    "cpu/integers/moe_forward.cpp": Covered("cpu/integers/moe_forward", "integers slots"),
    "cpu/integers/rows.cpp": Covered("cpu/integers/rows", "integers"),
}  # fmt: skip

ISAS = ("avx2", "avx512", "avx512vnni", "avx512bf16")  # of the build: each needs those before it


# ---- the two build trees --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tree:
    path: Path
    options: tuple[str, ...]
    isas: tuple[str, ...]

    def build(self, targets: list[str], jobs: int) -> None:
        common = ("-G", "Ninja", "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1 -w", "-DSWITCHGEAR_PYTHON=OFF")
        isas = f"-DSWITCHGEAR_CPU_ISAS={';'.join(self.isas) or 'none'}"
        configure = ["cmake", "-S", ROOT, "-B", self.path, *common, "-DSWITCHGEAR_TESTS=ON", isas, *self.options]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["ninja", "-C", self.path, f"-j{jobs}", *targets], check=True)


PLAIN = Tree(ROOT / "build/mutants", (), ISAS)
ADDRESS = Tree(ROOT / "build/mutants-asan", ("-DSWITCHGEAR_SANITIZE=address",), ())


@cache
def compilations(tree: Tree) -> dict[str, list[str]]:
    entries = json.loads((tree.path / "compile_commands.json").read_text())
    return {entry["file"]: shlex.split(entry["command"]) for entry in entries}


@cache
def link_command(tree: Tree, program: str) -> list[str]:
    ninja = ["ninja", "-C", str(tree.path), "-t", "commands", "-s", f"tests/cpp/{program}"]
    output = subprocess.run(ninja, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    words = shlex.split(output.removeprefix(": && ").removesuffix(" && :"))
    return [word for word in words if "--dependency-file" not in word]


# ---- one mutant -----------------------------------------------------------------------------------------------------


def compile_units(tree: Tree, covered: Covered, csrc: Path, home: Path) -> list[Path] | None:
    """The objects, or None if the mutant is no C++."""
    objects = []
    for unit in covered.units.split():
        source = csrc / f"{unit}.cpp"
        written = tree.path / f"csrc/{unit}.cpp"  # by cmake, for an ISA
        command = list(compilations(tree)[str(SOURCES / f"{unit}.cpp" if source.exists() else written)])
        objects.append(home / f"{unit.replace('/', '_')}.o")
        command[command.index("-o") + 1] = str(objects[-1])
        command[command.index("-c") + 1] = str(source if source.exists() else written)
        command = [f"-I{csrc}" if word == f"-I{SOURCES}" else word for word in command]
        without_cache = {**os.environ, "CCACHE_DISABLE": "1"}
        if subprocess.run(command, cwd=tree.path, capture_output=True, check=False, env=without_cache).returncode != 0:
            return None
    return objects


def link(tree: Tree, program: str, objects: list[Path], home: Path) -> Path:
    command = list(link_command(tree, program))
    command[command.index("-o") + 1] = str(home / program)
    at = command.index("-o")
    command[at:at] = [str(o) for o in objects]  # so that the linker ignores the library's own
    subprocess.run(command, cwd=tree.path, check=True)
    return home / program


def run(program: Path, tests: list[str], isa: str, seconds: int) -> str:
    """What failed, or nothing. A mutant may loop forever or want all memory."""
    environment = {**os.environ, "SWITCHGEAR_CPU_ISA": isa, "SWITCHGEAR_FAIL_FAST": "1", "OMP_WAIT_POLICY": "passive"}
    environment["ASAN_OPTIONS"] = "detect_leaks=1:allocator_may_return_null=1:hard_rss_limit_mb=4096"
    limits = f"ulimit -t {seconds}; ulimit -c 0; exec nice timeout -k 1 {10 * seconds} "
    try:
        command = ["sh", "-c", limits + '"$@"', "sh", str(program), *tests]
        done = subprocess.run(command, capture_output=True, env=environment, timeout=11 * seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"no end after {10 * seconds} s"
    lines = (done.stdout + done.stderr).decode(errors="replace").splitlines()
    if done.returncode == 0:
        return ""
    said = [line for line in lines if "ERROR: " in line or ".cpp:" in line or ".h:" in line] or lines[-1:] or [""]
    if done.returncode < 0:
        said = [f"killed by {signal.Signals(-done.returncode).name}"]
    return said[0].replace(f"{ROOT}/", "") or f"exit status {done.returncode}"


@dataclass(frozen=True)
class Outcome:
    mutation: Mutation
    verdict: str  # "killed", "survived", or what does not count: "no C++", "same code"
    reason: str  # program: what it says
    seconds: float


def programs_of(covered: Covered) -> Iterator[tuple[str, list[str]]]:
    for word in covered.programs.split():
        program, _, test = word.partition(":")
        yield f"test_{program}", [test] if test else []


def examine(mutation: Mutation) -> Outcome:
    start = time.monotonic()
    covered = FILES[mutation.file]

    def outcome(verdict: str, reason: str = "") -> Outcome:
        return Outcome(mutation, verdict, reason, time.monotonic() - start)

    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        home = Path(directory)
        csrc = home / "csrc"
        shutil.copytree(SOURCES, csrc, ignore=shutil.ignore_patterns("cuda", "__pycache__"))
        edited = csrc / mutation.file
        source = edited.read_text()
        for tree, seconds in ((PLAIN, 20), (ADDRESS, 60)):
            if covered.isa not in ("generic", *tree.isas):
                continue
            edited.write_text(mutation.apply(source))
            objects = compile_units(tree, covered, csrc, home)
            if objects is None:
                return outcome("no C++")
            for program, tests in programs_of(covered):
                reason = run(link(tree, program, objects, home), tests, covered.isa, seconds)
                if reason:
                    return outcome("killed", f"{program}{' asan' if tree is ADDRESS else ''}: {reason}")
            if tree is PLAIN:
                code = [path.read_bytes() for path in objects]
                edited.write_text(source)
                compile_units(tree, covered, csrc, home)  # to the same paths
                if code == [path.read_bytes() for path in objects]:
                    return outcome("same code")
    return outcome("survived")


# ---- all of them ----------------------------------------------------------------------------------------------------


def ledger() -> list[Equivalent]:
    return read_ledger(LEDGER.read_text())


def sources() -> dict[str, str]:
    return {file: (SOURCES / file).read_text() for file in FILES}


def candidates(texts: dict[str, str], entries: list[Equivalent]) -> dict[str, list[Mutation]]:
    """All mutations that tests should detect. It is an error if an entry of the ledger covers none."""
    found = {file: mutations(file, text) for file, text in texts.items()}
    for entry in entries:
        if not any(entry.covers(mutation) for mutation in found.get(entry.file, [])):
            raise SystemExit(f"{LEDGER.name}: expected a mutation of {entry.file}: {entry.text}: {entry.label}")
    return {
        file: [m for m in all_of_file if not any(entry.covers(m) for entry in entries)]
        for file, all_of_file in found.items()
    }


def clean_programs_pass(chosen: list[Mutation]) -> set[str]:
    """The ISAs of this machine, after their tests have passed."""
    needed = {(FILES[m.file].isa, word) for m in chosen for word in FILES[m.file].programs.split()}
    available = set()
    for isa in {isa for isa, _ in needed}:
        here = run(PLAIN.path / "tests/cpp/test_backends", [], isa, 20)
        if here and isa != "generic":
            print(f"{isa}: not run on this machine")
            continue
        available.add(isa)
    for isa, word in sorted(needed):
        program, _, test = word.partition(":")
        for tree in (PLAIN, ADDRESS):
            if isa in available and isa in ("generic", *tree.isas):
                reason = run(tree.path / f"tests/cpp/test_{program}", [test] if test else [], isa, 100)
                if reason:
                    raise SystemExit(f"{program} fails without any mutation: {reason}")
    return available


def planted(mistake: Mistake, texts: dict[str, str]) -> Mutation:
    file = mistake.file if mistake.file in texts else f"cpu/{mistake.file}"
    source = texts[file]
    if source.count(mistake.before) != 1:
        raise SystemExit(f"{mistake.name}: expected its text once in {file}, got {source.count(mistake.before)}")
    begin = source.index(mistake.before)
    line = source.count("\n", 0, begin) + 1
    return Mutation(
        file, line, mistake.before, "planted", begin, begin + len(mistake.before), mistake.after, mistake.name
    )


def report(outcomes: list[Outcome]) -> float:
    counted = [o for o in outcomes if o.verdict in ("killed", "survived")]
    killed, total = Counter(), Counter()
    for o in counted:
        killed[o.mutation.file] += o.verdict == "killed"
        total[o.mutation.file] += 1
    print(f"\n{'file':34}{'killed':>8}{'of':>6}")
    for file in sorted(total):
        print(f"{file:34}{killed[file]:8}{total[file]:6}")
    score = killed.total() / max(1, total.total())
    print(f"{'all':34}{killed.total():8}{total.total():6}   {100 * score:.1f} %")
    verdicts = Counter(o.verdict for o in outcomes)
    print(f"not counted: {verdicts['no C++']} that do not compile, {verdicts['same code']} that change no code")
    return score


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--part", default="1/1", help="of the chosen mutants, e.g. 2/8")
    parser.add_argument("--no-build", action="store_true", help="the build trees are up to date")
    parser.add_argument("--list", action="store_true", help="print the chosen mutations and stop")
    parser.add_argument("files", nargs="*", help="parts of the names of files; all by default")
    options = parser.parse_args()
    texts = sources()
    chosen = [planted(mistake, texts) for mistake in MISTAKES]
    chosen += selection(candidates(texts, ledger()), options.count, options.seed)
    chosen = [m for m in chosen if not options.files or any(part in m.file for part in options.files)]
    part, parts = map(int, options.part.split("/"))
    chosen = chosen[part - 1 :: parts]
    if options.list:
        for m in chosen:
            print(f"{m.file}:{m.line}: {m.kind}: {m.label}\n    {m.text}")
        return 0
    programs = sorted({program for m in chosen for program, _ in programs_of(FILES[m.file])} | {"test_backends"})
    for tree in () if options.no_build else (PLAIN, ADDRESS):
        tree.build(programs, options.jobs)
    available = clean_programs_pass(chosen)
    outcomes = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for o in pool.map(examine, (m for m in chosen if FILES[m.file].isa in available)):
            outcomes.append(o)
            m = o.mutation
            print(
                f"{o.verdict:10}{m.file}:{m.line} {m.kind}: {m.label}   {o.reason[:100]} ({o.seconds:.0f} s)",
                flush=True,
            )
            if o.verdict == "survived":
                print(f"          {m.text}", flush=True)
    missed = [o.mutation.label for o in outcomes if o.mutation.kind == "planted" and o.verdict != "killed"]
    score = report(outcomes)
    print("".join(f"MISSED: {label}\n" for label in missed), end="")
    return 1 if missed or (score < GOAL and parts == 1) else 0


if __name__ == "__main__":
    sys.exit(main())
