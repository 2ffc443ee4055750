# SPDX-License-Identifier: BSD-3-Clause
"""Installs a wheel beside a release of torch in a new environment, and runs import, doctor and the README's example.

python tests/release/clean_environment.py dist [--torch 2.8] [--python python3.12]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
DROPPED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


def example() -> str:
    """The README's first programs that need torch alone."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return "\n".join(block for block in blocks if "transformers" not in block)


def version() -> str:
    """Of pyproject.toml. Python 3.10 has no tomllib."""
    found = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found
    return found[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="a folder with the wheel")
    parser.add_argument("--torch", default="newest", help="a release, e.g. 2.8")
    parser.add_argument("--python", default=sys.executable)
    args = parser.parse_args()
    environment = {name: value for name, value in os.environ.items() if name not in DROPPED}
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "env/bin/python")

        def run(*command: str | Path, text: str | None = None) -> None:
            print("$", *command, flush=True)
            words = [str(word) for word in command]
            subprocess.run(words, cwd=folder, env=environment, input=text, text=True, check=True)

        run(args.python, "-m", "venv", "env")
        torch = "torch" if args.torch == "newest" else f"torch=={args.torch}.*"
        pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        run(*pip, torch)  # all that it depends on, which pip check verifies
        # Not from the index, which may have another package of this name.
        run(*pip, "--no-index", "--no-deps", "--find-links", args.wheels.resolve(), f"switchgear=={version()}")
        run(python, "-m", "pip", "check")
        run(python, "-c", "import switchgear, torch; print(switchgear.__version__, torch.__version__)")
        run(python, "-m", "switchgear", "info")
        run(python, "-m", "switchgear", "doctor")
        run(python, "-", text=example())
    return 0


if __name__ == "__main__":
    sys.exit(main())
