# SPDX-License-Identifier: BSD-3-Clause
"""The files of `switchgear bench`: results, the verdicts on them, tables in documents."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from errors import raises
from full_disk import full_disk
from switchgear.cli import main
from switchgear.cli.common import CommandError, check_file
from switchgear_bench.layer_tables import case_table, fill
from switchgear_bench.layer_tables import write_document as write_markdown
from switchgear_bench.results import SCHEMA, completed, load, merge, save, undisturbed, write_csv, write_json
from switchgear_bench.targets import Verdict, judge


def bench_row(competitor: str, ms: float | None, **changes: Any) -> dict[str, Any]:
    """A row whose floor is reading the weights, which takes 1 ms."""
    row = {
        "shape": "olmoe", "dtype": "bf16", "mode": "forward", "tokens": 1, "routing": "balanced", "pages": "huge",
        "allocator": "default", "touched_experts": 8.0, "multiply_rate": 1e12, "read_ms": 1.0,
        "competitor": competitor, "ms": ms, "relative_error": 1e-3, "quiet_turns": 3,
    }  # fmt: skip
    return completed(row | changes)


def bench_results_of(*rows: dict[str, Any], model: str = "a CPU") -> dict[str, Any]:
    machine = {"model": model, "threads": 2, "isa": "avx512", "torch": "2.13", "transformers": "5", "switchgear": "0.1"}
    ceilings: dict[str, Any] = {"compute": {}, "read": {"loads": 1e9}}
    return {"schema": SCHEMA, "machine": machine, "ceilings": ceilings, "results": list(rows), "skipped": []}


def test_targets_hold_or_not() -> None:
    ours = bench_row("switchgear", 1.04)
    rows = [ours, bench_row("sglang", 1.04), bench_row("zentorch", 1.0), bench_row("hf_grouped_mm", 3.0)]
    verdicts = {verdict.target: verdict for verdict in judge([rows])}
    assert verdicts["1x sglang"] == Verdict("olmoe, T=1, bf16, forward", "1x sglang", "1.00x (sglang)", True)
    assert not verdicts["1x zentorch"].holds
    assert verdicts["95% of the read of the touched weights"].holds
    assert not verdicts["3x hf_grouped_mm"].holds
    wrong = [ours, bench_row("sglang", None)]  # a wrong result is compared with none
    assert [verdict.target for verdict in judge([wrong])] == ["95% of the read of the touched weights"]


def test_a_quantised_target_wants_no_larger_error() -> None:
    ours = bench_row("switchgear_int8", 1.0, dtype="int8", relative_error=0.03)
    for error, holds in ((0.02, False), (0.03, True)):
        rows = [ours, bench_row("sglang_int8", 1.5, dtype="int8", relative_error=error)]
        assert [verdict.holds for verdict in judge([rows])] == [holds]


def test_a_file_has_medians_from_which_the_rest_follows(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    rows = [bench_row("switchgear", 2.0), bench_row("sglang", None), bench_row("switchgear", 1 / 3, tokens=16)]
    save(bench_results_of(*(row | {"turns": 3} for row in rows)), str(path))
    assert len(path.read_text().splitlines()) < 12
    again = load(str(path), "--from")["results"]
    assert again[:2] == rows[:2]
    assert again[2] == completed(rows[2] | {"ms": 0.33333333})
    assert (rows[0]["percent_of_floor"], rows[0]["bound"], rows[1]["wrong"]) == (50.0, "memory", True)


@pytest.mark.parametrize(
    "content",
    [{}, {"cases": []}, {"machine": {}, "ceilings": {}, "skipped": [], "cases": [{"shape": "tiny"}]}, {"cases": 1}],
)
def test_a_file_without_results_is_named(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"schema": SCHEMA} | content))
    assert main(["bench", "layers", "--from", str(path)]) == 2
    assert f"--from: expected the results of a run in {path}, got " in capsys.readouterr().err


def test_results_replace_a_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that a link names; what is no file is written to."""
    path, link = tmp_path / "results.json", tmp_path / "link.json"
    path.write_text("before")
    link.symlink_to(path)

    def fails(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with raises(CommandError, "--json"):
            write_json({"a": 1}, str(link))
        assert path.read_text() == "before"
    write_json({"a": 1}, str(link))
    assert link.is_symlink()
    assert json.loads(path.read_text()) == {"a": 1}
    write_json({"a": 1}, os.devnull)
    assert not Path(os.devnull).is_file()


def test_results_of_runs_share_a_file() -> None:
    earlier = bench_results_of(bench_row("switchgear", 2.0), bench_row("switchgear", 9.0, tokens=16))
    later = bench_results_of(bench_row("switchgear", 1.0), bench_row("sglang", 1.5))
    rows = merge(earlier, later, "results.json")["results"]
    assert [(row["tokens"], row["competitor"], row["ms"]) for row in rows] == [
        (1, "switchgear", 1.0), (1, "sglang", 1.5), (16, "switchgear", 9.0)
    ]  # fmt: skip
    late = {"case": "olmoe, T=1, bf16, forward", "competitor": "all", "reason": "the time is used up"}
    assert merge(earlier | {"skipped": [late]}, later, "results.json")["skipped"] == []  # it is measured now
    with raises(CommandError):
        merge(earlier, bench_results_of(model="another"), "results.json")


def test_no_target_is_judged_by_a_case_that_others_disturbed_throughout() -> None:
    results = bench_results_of(bench_row("switchgear", 2.0), bench_row("sglang", 1.5, quiet_turns=0))
    assert undisturbed(results) == []
    assert "| forward, disturbed |" in case_table(results)
    results["results"][1]["quiet_turns"] = 1
    assert undisturbed(results) == [results["results"]]


def test_bench_makes_tables_of_a_file(tmp_path: Path) -> None:
    source, table = tmp_path / "results.json", tmp_path / "table.md"
    source.write_text("{}")
    assert main(["bench", "layers", "--from", str(source)]) == 2
    save(bench_results_of(bench_row("switchgear", 2.0), bench_row("hf_grouped_mm", 7.0)), str(source))
    assert main(["bench", "layers", "--from", str(source), "--markdown", str(table)]) == 0
    assert "| olmoe | 1 | bf16 | forward | 2.00 | 50 % | 3.50x |  |" in table.read_text()
    assert "3x hf_grouped_mm" in table.read_text()


def test_tables_go_where_a_document_wants_them() -> None:
    results = bench_results_of(bench_row("switchgear", 2.0), bench_row("hf_grouped_mm", 7.0))
    text = "before\n<!-- bench:summary -->\nold\n<!-- /bench:summary -->\nafter\n"
    filled = fill(text, results)
    assert "old" not in filled
    assert "| olmoe | bf16 | 2.00 ms, 50 %, **3.5x** |  |  |" in filled
    assert filled.startswith("before\n<!-- bench:summary -->\n|")
    assert filled.endswith("|\n<!-- /bench:summary -->\nafter\n")
    assert fill(filled, results) == filled
    with raises(CommandError):
        fill(text.replace("summary", "everything"), results)


@pytest.fixture
def bench_results(tmp_path: Path) -> str:
    path = tmp_path / "results.json"
    save(bench_results_of(bench_row("switchgear", 2.0), bench_row("hf_grouped_mm", 7.0)), str(path))
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Mine\n\nmuch work\n", "expected a new file, or a document with pairs of lines"),
        ("# Mine\n<!--bench:cases-->\n<!--/bench:cases-->\n", "got '<!--bench:cases-->' without the other in"),
        ("# Mine\n<!-- bench:cases -->\nmuch work\n", "got '<!-- bench:cases -->' without the other in"),
        ("<!-- bench:cases -->\n<!-- bench:summary -->\n<!-- /bench:summary -->\n<!-- /bench:cases -->\n", "without"),
        ("<!-- bench:cases -->\n<!-- /bench:cases -->\n<!-- /bench:summary -->\n", "got '<!-- /bench:summary -->'"),
        ("<!-- bench:cases -->\n<!-- /bench:cases -->\ncaf\xe9\n", "expected text in UTF-8"),
    ],
)
def test_a_document_without_places_for_tables_is_left_as_it_is(
    text: str, message: str, bench_results: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_bytes(text.encode("latin-1"))
    table = tmp_path / "table.csv"
    assert main(["bench", "layers", "--from", bench_results, "--csv", str(table), "--markdown", str(page)]) == 2
    error = capsys.readouterr().err
    assert "--markdown: expected" in error
    assert message in error
    assert page.read_bytes() == text.encode("latin-1")
    assert not table.exists()  # the document is read before the work


def test_a_document_keeps_its_text_its_ends_of_lines_and_its_permissions(bench_results: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_bytes(
        "é `<!-- bench:cases -->`\r\n  <!-- bench:cases -->\r\nold\r\n  <!-- /bench:cases --> \r\nend".encode()
    )
    page.chmod(0o600)
    assert main(["bench", "layers", "--from", bench_results, "--markdown", str(page)]) == 0
    text = page.read_bytes().decode()
    assert text.startswith("é `<!-- bench:cases -->`\r\n  <!-- bench:cases -->\r\n|")
    assert text.endswith("|\r\n  <!-- /bench:cases --> \r\nend")
    assert "old" not in text
    assert text.count("\n") == text.count("\r\n")
    assert page.stat().st_mode & 0o777 == 0o600


def test_a_new_document_can_be_filled_again(bench_results: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    command = ["bench", "layers", "--from", bench_results, "--markdown", str(page)]
    assert main(command) == 0
    text = page.read_text()
    assert re.findall("<!-- bench:(.*) -->", text) == ["machine", "cases", "targets"]
    page.write_text(text.replace("7.00", "1.00"))
    assert main(command) == 0
    assert page.read_text() == text


def test_a_full_disk_leaves_files_as_they_were(bench_results: str, tmp_path: Path) -> None:
    page, table = tmp_path / "page.md", tmp_path / "table.csv"
    page.write_text("<!-- bench:cases -->\n<!-- /bench:cases -->\n")
    table.write_text("before")
    results = load(bench_results, "--from")
    with full_disk(), raises(CommandError, "--markdown"):
        write_markdown(results, str(page))
    with full_disk(), raises(CommandError, "--csv"):
        write_csv(results["results"], str(table))
    assert page.read_text() == "<!-- bench:cases -->\n<!-- /bench:cases -->\n"
    assert table.read_text() == "before"
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_file_that_cannot_be_replaced_is_named_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder takes no other file."""

    def denied(**_: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    with raises(CommandError, "--csv"):
        check_file("csv", tmp_path / "table.csv")
