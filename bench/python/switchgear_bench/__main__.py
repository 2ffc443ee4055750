# SPDX-License-Identifier: BSD-3-Clause
"""`python -m switchgear_bench`: the same commands as the `switchgear-bench` console script."""

import sys

from switchgear_command import bench as main

if __name__ == "__main__":  # worker processes import this module again under another name
    sys.exit(main())
