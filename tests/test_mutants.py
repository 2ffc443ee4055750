# SPDX-License-Identifier: BSD-3-Clause
"""Checks in a second, before anything is built, that mutants.py edits all kernels and that its ledger is exact."""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import mutants
from mutations import mutations, selection

# What is not mutated, since only a machine or a module that the tests do not have would tell.
APART = {
    "cpu/integers/kernels.h", "cpu/kernels.h", "cpu/context.h", "cpu/ops.h", "cpu/rows.h", "cpu/token_sum.h",
    "cpu/weight_gradient.h",  # declarations
    "cpu/module.cpp", "cpu/measure_binding.cpp",  # the Python module
    "cpu/pages.cpp", "cpu/pages.h", "cpu/probe.cpp",  # huge pages, ceilings
    "cpu/simd_neon.h",
    "cpu/amx.h", "cpu/amx_block.h", "cpu/amx_dot_products.inl", "cpu/amx_multiply.inl", "cpu/amx_tiles.h",
    "cpu/gathered.h", "cpu/kernels_amx.cpp", "cpu/integers/kernels_amx.cpp",  # other processors
}  # fmt: skip


def test_every_kernel_has_mutants() -> None:
    found = mutants.candidates(mutants.sources(), mutants.ledger())
    chosen = selection(found, 240, seed=1)
    assert len(chosen) >= 220
    assert set(Counter(m.kind for m in chosen)) >= {
        "boundary",
        "arithmetic",
        "number",
        "statement",
        "check",
        "operands",
    }
    assert {m.file for m in chosen} == set(mutants.FILES)


def test_a_mistake_edits_one_place() -> None:
    texts = mutants.sources()
    for mistake in mutants.MISTAKES:
        mutation = mutants.planted(mistake, texts)
        assert mutation.apply(texts[mutation.file]) != texts[mutation.file]


def test_every_file_is_mutated_or_named() -> None:
    folder = mutants.SOURCES / "cpu"
    files = {str(p.relative_to(mutants.SOURCES)) for p in folder.rglob("*") if p.suffix in (".cpp", ".h", ".inl")}
    empty = {f for f in files if not mutations(f, (mutants.SOURCES / f).read_text())}
    assert files - empty - APART == {f for f in mutants.FILES if f.startswith("cpu/")} - empty


def test_kinds_of_edits() -> None:
    source = (
        'void f() {\n  check_range("a < b", 1);  // 2 + 3\n  y[i] = std::min(n - 1, ceil_div(m, 4));\n  return;\n}\n'
    )
    found = {(m.kind, m.label) for m in mutations("f.cpp", source)}
    assert found == {
        ("check", "dropped"),
        ("number", "1 -> 0"),
        ("number", "4 -> 5"),
        ("statement", "dropped"),
        ("extremum", "std::min -> std::max"),
        ("arithmetic", "- -> +"),
        ("operands", "n - 1 -> 1 - n"),
        ("rounding", "ceil_div(m, 4) -> ((m) / (4))"),
        ("arguments", "m, 4 -> 4, m"),
    }
