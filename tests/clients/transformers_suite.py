# SPDX-License-Identifier: BSD-3-Clause
"""transformers' own tests of models with switchgear's experts, then with whole layers and linears: none may fail that
passes with the default.

    python tests/clients/transformers_suite.py build/clients-transformers [--families "mixtral olmoe"]

The tests come from the sdist of the installed transformers, which pip downloads into the folder. It has the common
tests (test_modeling_common.py), but neither the files of single models nor the tests of generation and exporters, whose
mixins are empty here. So moe_families.py applies the common tests to tiny configs of each family.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from xml.etree import ElementTree

import transformers

DEFAULT = "grouped_mm"
OURS = "switchgear", "whole_layers"
FAMILIES = "mixtral gpt_oss"
ABSENT = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}


def prepare(folder: Path) -> None:
    """The package `tests` of the sdist, in the folder."""
    name = f"transformers-{transformers.__version__}"
    if not (folder / f"{name}.tar.gz").exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        sdist = name.replace("-", "==")
        subprocess.run([*pip, "--no-binary", "transformers", "--dest", folder, sdist], check=True)
    with tarfile.open(folder / f"{name}.tar.gz") as archive:
        members = [member for member in archive if member.name.startswith(f"{name}/tests/")]
        for member in members:
            member.name = member.name.removeprefix(f"{name}/")
        archive.extractall(folder, members, filter="data")
    for file, mixin in ABSENT.items():
        path = folder / "tests" / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"class {mixin}:\n    pass\n")
        (path.parent / "__init__.py").touch()
    (folder / "tests/__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = ignore::pytest.PytestUnknownMarkWarning\n")
    (folder / "tests/moe_families.py").write_bytes(Path(__file__).with_name("moe_families.py").read_bytes())
    (folder / "tiny_configs.py").write_bytes((Path(__file__).parents[1] / "tiny_configs.py").read_bytes())


def outcomes(folder: Path, experts: str, families: str) -> dict[str, str]:
    """ "passed", "failure", "error" or "skipped" of each test."""
    report = folder / f"{experts}.xml"
    report.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report.name}",
    ]
    environment = {**os.environ, "EXPERTS": experts, "FAMILIES": families, "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    plugins = ["-p", "switchgear.integrations.transformers"]
    with (folder / f"{experts}.log").open("w") as log:
        subprocess.run(
            [*command, *plugins, "tests/moe_families.py"], cwd=folder, env=environment, stdout=log, check=False
        )
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found[f"{case.get('classname').rpartition('.')[2]}::{case.get('name')}"] = (
            case[0].tag if len(case) else "passed"
        )
    counts = {verdict: list(found.values()).count(verdict) for verdict in sorted(set(found.values()))}
    print(f"{experts}: {counts}, {time.monotonic() - start:.0f} s", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--families", default=FAMILIES)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    prepare(args.folder)
    default = outcomes(args.folder, DEFAULT, args.families)
    passed = [name for name, verdict in default.items() if verdict == "passed"]
    worse = []
    for experts in OURS:
        ours = outcomes(args.folder, experts, args.families)
        lost = {name: ours.get(name, "not run") for name in passed if ours.get(name) != "passed"}
        print(f"{len(lost)} of the {len(passed)} tests that pass with {DEFAULT} do not with {experts}")
        worse += lost.items()
    for name, verdict in worse:
        print(f"{name}: {verdict}")
    if not passed:
        print(f"expected tests that pass, got none: {args.folder / DEFAULT}.log says why")
    return int(bool(worse) or not passed)


if __name__ == "__main__":
    sys.exit(main())
