# SPDX-License-Identifier: BSD-3-Clause
"""Plants mistakes in the kernels of routing policies, one at a time, and expects their C++ tests to fail.

    cmake --preset cpu && cmake --build --preset cpu --target test_policies
    python tests/cpp/planted/policies.py build/cpu [part of a name …]

The sources are not modified: a copy with one edit is compiled with the flags of the build tree and linked before the
library. It is an error if an edit's text is no longer in the sources. Run by hand, since it takes a minute or two.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
KERNELS = ROOT / "csrc/cpu"
PROGRAM = "tests/cpp/test_policies"
SECONDS = 120


@dataclass(frozen=True)
class Mistake:
    name: str
    source: str  # in csrc/cpu, compiled again
    before: str  # occurs in `edited` exactly once
    after: str
    edited: str = ""  # a header, if not the source itself

    @property
    def file(self) -> str:
        return self.edited or self.source


MISTAKES = (
    Mistake("min_experts counts for nothing", "route_dynamic.cpp",
            "rank >= options.min_experts && !(mass < options.top_p)", "!(mass < options.top_p)"),
    Mistake("the mass is that of the next expert", "route_dynamic.cpp",
            "!(mass < options.top_p)) break;", "!(mass + row.scores[0] < options.top_p)) break;"),
    Mistake("scores below the threshold", "route_dynamic.cpp", "!(score >= options.threshold)", "false"),
    Mistake("weights behind the last choice", "route_dynamic.cpp",
            "      std::fill(weights + count, weights + max_experts, 0.0f);\n", ""),
    Mistake("ties to the highest expert", "route_dynamic.cpp", "(~index & 0xffffffff)", "(index & 0xffffffff)",
            "ranking.h"),
    Mistake("the last of equal tokens is left", "column_topk.cpp", "t <= cut[e].last", "t < cut[e].last"),
    Mistake("a bin that is taken whole", "column_topk.cpp", "rest > histogram[bin]", "rest >= histogram[bin]"),
    Mistake("one sequence for all", "column_topk.cpp", "? sequence_ids[t] : 0) * num_experts",
            "? 0 : 0) * num_experts"),
    Mistake("-0 below 0", "column_topk.cpp", "std::bit_cast<int32_t>(value + 0.0f)", "std::bit_cast<int32_t>(value)",
            "ranking.h"),
    Mistake("NaN is large", "column_topk.cpp", "v = v > -kFloatMax ? v : -kFloatMax;",
            "v = v < -kFloatMax ? -kFloatMax : v;", "ranking.h"),
    Mistake("one place too many", "fit_capacity.cpp", "if (size <= limit) return;", "if (size <= limit + 1) return;"),
    Mistake("holes take places", "fit_capacity.cpp", "topk_ids[i] < 0 ? -1 : group_of(i / top_k, topk_ids[i])",
            "group_of(i / top_k, std::max(topk_ids[i], 0))"),
    Mistake("choices by token", "fit_capacity.cpp", "i % top_k * num_tokens + i / top_k", "i"),
    Mistake("priorities that are NaN", "fit_capacity.cpp", "~key_of(sanitise(priorities[i]), i)",
            "~key_of(priorities[i], i)"),
    Mistake("full experts have room", "fit_capacity.cpp", "room[g] = std::max<int64_t>(0, limit - size);",
            "room[g] = limit;"),
    Mistake("offers in any order", "fit_capacity.cpp",
            "    std::sort(offers.begin(), offers.end(), precedence.before());\n", ""),
    Mistake("rerouted to an expert that it has", "fit_capacity.cpp", "heap[chosen[k]] = -1;", ";"),
    Mistake("the last experts get one more", "assign_balanced.cpp", "(e < sizes[b] % num_experts)",
            "(e >= num_experts - sizes[b] % num_experts)"),
    Mistake("prices stay", "assign_balanced.cpp",
            "price[shop] = value_of(*std::min_element(held.begin(), held.end()));", "price[shop] = 0.0f;"),
    Mistake("leftover tokens to full experts", "assign_balanced.cpp",
            "while (std::ssize(holders[first + e]) == places[first + e]) ++e;", ""),
    Mistake("a charge m times as wrong", "assign_capped.cpp", "if (charge > last) return last;",
            "if (charge > last) return charge;"),
    Mistake("the first j that comes", "assign_capped.cpp", "if (next.count == at.count || next.count >= total)",
            "if (true)"),
    Mistake("tokens are paid", "assign_capped.cpp", "num_experts, cap, 0.0f,", "num_experts, cap, -1.0f,"),
    Mistake("the limit of the first sequence", "assign_capped.cpp", "limits[b], n)", "limits[0], n)"),
    Mistake("tokens are charged last", "assign_capped.cpp", "false);\n    a.charge_experts();\n", "false);\n"),
    Mistake("the first to settle stops all", "assign_capped.cpp", "return std::all_of(settled",
            "return std::any_of(settled"),
    Mistake("tokens in the order of sequences", "assign_capped.cpp", "as<float>() + sequences.members[i] *",
            "as<float>() + i *"),
)  # fmt: skip


def build_mistake(build: Path, mistake: Mistake) -> Path:
    home = build / "planted" / "".join(c if c.isalnum() else "_" for c in mistake.name)
    home.mkdir(parents=True, exist_ok=True)
    for path in (KERNELS / mistake.source, *KERNELS.glob("*.h")):  # the source includes its neighbours
        shutil.copy(path, home)
    text = (home / mistake.file).read_text()
    if text.count(mistake.before) != 1:
        raise SystemExit(f"{mistake.name}: expected its text once in {mistake.file}, got {text.count(mistake.before)}")
    (home / mistake.file).write_text(text.replace(mistake.before, mistake.after))

    entries = json.loads((build / "compile_commands.json").read_text())
    command = next(shlex.split(e["command"]) for e in entries if e["file"] == str(KERNELS / mistake.source))
    command[command.index("-o") + 1] = str(home / "mistake.o")
    command[command.index("-c") + 1] = str(home / mistake.source)
    subprocess.run([*command, "-w"], cwd=build, check=True)

    ninja = ["ninja", "-C", str(build), "-t", "commands", "-s", PROGRAM]
    output = subprocess.run(ninja, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    link = shlex.split(output.removeprefix(": && ").removesuffix(" && :"))
    link = [word for word in link if "--dependency-file" not in word]
    link[link.index("-o") + 1] = str(home / "program")
    link.insert(link.index("-o"), str(home / "mistake.o"))  # so that the linker ignores the library's own
    subprocess.run(link, cwd=build, check=True)
    return home / "program"


def passes(program: Path) -> tuple[bool, str]:
    """Whether the tests pass, and the line that gives the reason if not."""
    try:
        done = subprocess.run([program], capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return False, f"no end after {SECONDS} s"
    lines = [line for line in done.stdout.splitlines() if ".cpp:" in line] or [f"exit status {done.returncode}"]
    return done.returncode == 0, lines[0].removeprefix(f"{ROOT}/")


def main(arguments: list[str]) -> int:
    if not arguments:
        raise SystemExit(__doc__)
    mistakes = [m for m in MISTAKES if not arguments[1:] or any(part in m.name for part in arguments[1:])]
    build = Path(arguments[0]).resolve()
    if not passes(build / PROGRAM)[0]:
        raise SystemExit(f"{PROGRAM} fails without any mistake")
    missed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mistake, (unseen, message) in zip(
            mistakes, pool.map(lambda m: passes(build_mistake(build, m)), mistakes), strict=True
        ):
            missed += unseen
            print(f"{'MISSED' if unseen else 'seen':8}{mistake.source:22}{mistake.name:40}{message[:90]}", flush=True)
    print(f"{len(mistakes)} mistakes, {missed} missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
