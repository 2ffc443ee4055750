# SPDX-License-Identifier: BSD-3-Clause
"""What a check found."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """verdict: ok; slow: it works, and could be faster; absent: a part that does not run here; broken: wrong results,
    or a package that cannot be imported. remedy: what to do about it, or empty."""

    subject: str
    verdict: str
    text: str
    remedy: str = ""

    @property
    def is_of_backend(self) -> bool:
        return self.subject.startswith(("CPU", "CUDA"))

    def __str__(self) -> str:
        indent = " " * 28
        lines = textwrap.wrap(self.text, 92)
        lines += textwrap.wrap(f"-> {self.remedy}", 92, subsequent_indent="   ") if self.remedy else []
        return f"{self.verdict:<8}{self.subject:<20}" + f"\n{indent}".join(lines or [""])
