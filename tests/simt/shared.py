# SPDX-License-Identifier: BSD-3-Clause
"""Runs the shared tests on the CUDA kernels in a build tree of tests/simt, once in every order of threads.

    shared.py asan|race|plain build/simt-asan -- tests/test_plan.py … [-- tests/test_papers_scores.py …]

Arguments after -- go to pytest; those after a second -- only in the first order. If one order fails, the others still
run. SIMT_ORDERS selects orders, separated by spaces.

papers.txt has tests of whole layers, one for each kind of score, selection and capacity, which CI runs in one order.
Running all of them in all orders takes ten minutes:

    shared.py race build/simt-race -- -q tests/test_papers_*.py tests/test_policy_ops.py
"""

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import address_sanitizer

FRAMES = 1  # of a report
ORDERS = ("forward", "reverse", "random:1")


def environment(kind: str, build: Path) -> dict[str, str]:
    modules = sorted(build.glob("tests/simt/module/_simt*.so"))
    if len(modules) != 1:
        raise SystemExit(f"{build}: expected one module _simt, found {len(modules)}")
    variables = address_sanitizer.environment(FRAMES) if kind == "asan" else dict(os.environ)
    return variables | {"SWITCHGEAR_SIMT": str(modules[0].resolve())}


def main(arguments: list[str]) -> int:
    kind, build, separator, *pytest = arguments
    if kind not in ("plain", "asan", "race") or separator != "--":
        raise SystemExit(__doc__)
    failed = []
    split = pytest.index("--") if "--" in pytest else len(pytest)
    everywhere, first = pytest[:split], pytest[split + 1 :]
    orders = os.environ.get("SIMT_ORDERS", "").split() or ORDERS
    for order in orders:
        tests = everywhere + first if order == orders[0] else everywhere
        command = [sys.executable, "-m", "pytest", "--capture=sys", "-k", "simt", *tests]  # reports bypass Python
        print(f"==== {kind}, {order}: {' '.join(command[1:])}", flush=True)
        start = time.monotonic()
        variables = {**environment(kind, Path(build)), "SWITCHGEAR_SIMT_ORDER": order}
        if subprocess.run(command, env=variables, check=False).returncode != 0:
            failed.append(order)
        print(f"==== {kind}, {order}: {time.monotonic() - start:.0f} s", flush=True)
    if failed:
        print(f"{kind}: failed in {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
