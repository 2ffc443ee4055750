# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear doctor`: checks the kernels of each backend against float64, and says what is slow or missing here.

kernels.py   runs each backend
settings.py  what of the machine and the process costs speed
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict

from ...backends import backend, use_backend
from .kernels import check_cpu, check_cuda, check_speed
from .settings import Finding, check_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def diagnose() -> Iterator[Finding]:
    """All findings, each as soon as it is known. Takes some ten seconds."""
    chosen = backend()
    with use_backend("native"):
        yield from check_cpu()
        yield from check_cuda()
        yield from check_settings(chosen)
        yield check_speed()


def run(args: argparse.Namespace) -> int:
    """Prints the findings; 1 if a backend is broken."""
    findings = []
    for finding in diagnose():
        findings.append(finding)
        if not args.json:
            print(finding, flush=True)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    return int(any(finding.verdict == "broken" and finding.is_of_backend for finding in findings))
