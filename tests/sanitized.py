# SPDX-License-Identifier: BSD-3-Clause
"""Runs tests of Python with the module _C of a build under the address sanitizer.

    sanitized.py build/asan -- -q tests/contracts/test_guard_pages.py …

Arguments after -- go to pytest. The rest of the package is the installed one.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

from address_sanitizer import environment

FRAMES = 8  # of a report


def load(module: Path) -> None:
    """Makes `module` the package's _C, before anything imports another one."""
    spec = importlib.util.spec_from_file_location("switchgear._C", module)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{module}: expected a Python module")
    import torch  # noqa: F401  # the OpenMP pool is torch's

    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    sys.modules[spec.name] = native
    import switchgear

    switchgear._C = native


def main(arguments: list[str]) -> int:
    if len(arguments) < 2 or arguments[1] not in ("--", "--child"):
        raise SystemExit(__doc__)
    build, role, *tests = arguments
    if role == "--":
        command = [sys.executable, __file__, build, "--child", *tests]
        return subprocess.run(command, env=environment(FRAMES), check=False).returncode
    modules = sorted(Path(build).glob("_C*.so"))
    if len(modules) != 1:
        raise SystemExit(f"{build}: expected one module _C, found {len(modules)}")
    load(modules[0].resolve())
    import pytest

    return pytest.main(["--capture=sys", *tests])  # reports bypass Python


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
