# SPDX-License-Identifier: BSD-3-Clause
"""python -m switchgear.presets: prints docs/presets.md."""

from switchgear.presets.page import page

if __name__ == "__main__":
    print(page(), end="")
