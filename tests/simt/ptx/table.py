# SPDX-License-Identifier: BSD-3-Clause
"""table.py FILE: prints every opcode in the PTX of the test programs, and fails if no thread has executed one.

The programs append to FILE if SWITCHGEAR_PTX_TABLE names it: lines "executed OPCODE" and "seen OPCODE" (coverage.h).
"""

import sys
from pathlib import Path


def main() -> int:
    lines = [line.split(" ", 1) for line in Path(sys.argv[1]).read_text().splitlines()]
    opcodes = sorted({opcode for _, opcode in lines})
    executed = {opcode for how, opcode in lines if how == "executed"}
    missing = [opcode for opcode in opcodes if opcode not in executed]
    for opcode in opcodes:
        print(f"{'executed' if opcode in executed else 'NEVER':9} {opcode}")
    share = 100.0 * len(executed) / max(1, len(opcodes))
    print(f"{len(opcodes)} opcodes in the PTX, {len(executed)} executed: {share:.1f} %")
    return 1 if missing or not opcodes else 0


if __name__ == "__main__":
    sys.exit(main())
