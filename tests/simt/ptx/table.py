# SPDX-License-Identifier: BSD-3-Clause
"""table.py FILE: prints every opcode in the PTX of the test programs, and fails if no thread has executed one.

The programs append to FILE if SWITCHGEAR_PTX_TABLE names it: "executed OPCODE" or "seen OPCODE" for those in nvcc's
PTX, "tested OPCODE" for others, which test_instructions.cpp executes (coverage.h).
"""

import sys
from pathlib import Path


def main() -> int:
    opcodes: dict[str, set[str]] = {"executed": set(), "seen": set(), "tested": set()}
    for line in Path(sys.argv[1]).read_text().splitlines():
        how, opcode = line.split(" ", 1)
        opcodes[how].add(opcode)
    in_ptx = sorted(opcodes["executed"] | opcodes["seen"])
    missing = 0
    for opcode in in_ptx:
        how = "by kernels" if opcode in opcodes["executed"] else "by tests" if opcode in opcodes["tested"] else "NEVER"
        missing += how == "NEVER"
        print(f"{how:10} {opcode}")
    share = 100.0 * (len(in_ptx) - missing) / max(1, len(in_ptx))
    print(f"{len(in_ptx)} opcodes in the PTX of the kernels, {len(in_ptx) - missing} executed: {share:.1f} %")
    return 1 if missing or not in_ptx else 0


if __name__ == "__main__":
    sys.exit(main())
