# SPDX-License-Identifier: BSD-3-Clause
"""`python -m switchgear`: the same commands as the `switchgear` console script."""

import sys

from switchgear_command import main

if __name__ == "__main__":  # worker processes of the demo import this module again under another name
    sys.exit(main())
