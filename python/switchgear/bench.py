# SPDX-License-Identifier: BSD-3-Clause
"""The old name of the package `switchgear_bench`, for `switchgear.bench.case` and `switchgear.bench.competitors`."""

import sys

from switchgear_bench import case, competitors

__path__: list[str] = []
sys.modules |= {f"{__name__}.case": case, f"{__name__}.competitors": competitors}
