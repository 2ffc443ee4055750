# SPDX-License-Identifier: BSD-3-Clause
"""same_lines.py PROGRAM MODEL: fails unless every line that PROGRAM prints is among those of MODEL."""

import subprocess
import sys


def lines(program: str) -> dict[str, str]:
    output = subprocess.run([program], stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(line.split("\t", 1) for line in output.splitlines())


def main() -> int:
    got, model = (lines(program) for program in sys.argv[1:])
    wrong = [name for name, words in got.items() if model.get(name) != words]
    print("\n".join([*(f"{name}: differs from the model" for name in wrong), f"{len(got)} cases, {len(wrong)} differ"]))
    return 1 if wrong or not got else 0


if __name__ == "__main__":
    sys.exit(main())
