# SPDX-License-Identifier: BSD-3-Clause
"""What is to be tested is run: CI leaves nothing out because a package is missing, and slow tests have a target."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CI = (ROOT / ".ci/run").read_text()


def test_slow_cpp_tests_have_a_target() -> None:
    declared = set(re.findall(r"CONFIGURATIONS (\w+)", (ROOT / "tests/cpp/CMakeLists.txt").read_text()))
    command = ["make", "--dry-run", "test-slow"]
    # Without the variables of a `make test KIND=…` that runs this.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "KIND")}
    commands = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"ctest --preset cpu -C (\w+)", commands)) == declared == {"slow"}


def test_ci_installs_what_its_stages_need() -> None:
    """Those that .ci/run looks for by a function; it says itself what else is missing."""
    needed = " ".join(re.findall(r"has_\w+ \|\| missing\+=\((.*)\)", CI)).split()
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    installed = " ".join(re.findall(r"apt-get install -y (.*)", workflow)).split()
    assert needed
    assert set(needed) == set(installed)


@pytest.mark.parametrize(
    ("ci", "group", "present", "fails"),
    [
        ("", "sanitizers", "", False),  # on a contributor's machine stages are left out
        ("true", "sanitizers", "has_benchmark has_arm", False),
        ("true", "sanitizers", "has_benchmark", True),
        ("true", "sanitizers", "has_arm", True),
        ("true", "python", "has_benchmark", False),  # which has no stage for Arm
    ],
)
def test_ci_fails_without_a_package(ci: str, group: str, present: str, fails: bool) -> None:
    functions = CI[CI.index("system_packages() {") : CI.index("# Without a CUDA compiler")]
    stand_ins = "".join(f"{name}() {{ [[ '{present}' == *{name}* ]]; }}\n" for name in ("has_benchmark", "has_arm"))
    script = f"""
        set -euo pipefail
        id() {{ echo 1000; }}  # not root
        has_ccache() {{ true; }}
        in_group() {{ [ "$1" = {group} ]; }}
        {stand_ins}
        {functions}
        system_packages
    """
    environment = {"GITHUB_ACTIONS": ci, "PYTHON": "python3", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (int(fails), "")
    assert ("is not run" in done.stdout) == (group == "sanitizers" and "has_arm" not in present)
