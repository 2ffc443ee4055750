# SPDX-License-Identifier: BSD-3-Clause
"""Makes mutants of C++ sources: each is one small edit, of a kind that programmers make by mistake.

The sources are formatted by clang-format, so binary operators have spaces around them and templates do not. That is
enough to find operators, statements and arguments without a parser. An edit that is no C++ does not count.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Mutation:
    file: str
    line: int
    text: str  # of the line, stripped
    kind: str
    begin: int  # source[begin:end] becomes `after`
    end: int
    after: str
    label: str  # "< -> <=", unique within the line's text

    def apply(self, source: str) -> str:
        return source[: self.begin] + self.after + source[self.end :]


Edit = tuple[str, int, int, str]  # kind, begin, end, after

REPLACED = {
    "boundary": {" < ": " <= ", " <= ": " < ", " > ": " >= ", " >= ": " > "},
    "equality": {" == ": " != ", " != ": " == "},
    "arithmetic": {" + ": " - ", " - ": " + ", " * ": " / ", " / ": " * ", " % ": " / "},
    "assignment": {" += ": " -= ", " -= ": " += ", " *= ": " /= ", " |= ": " &= "},
    "logic": {" && ": " || ", " || ": " && ", " | ": " & ", " & ": " | ", " << ": " >> ", " >> ": " << "},
    "extremum": {"std::min": "std::max", "std::max": "std::min"},
    "rounding": {"nearbyint": "trunc", "lrint": "(long)floor", "floor": "ceil", "ceil_div": "floor_div"},
    "truth": {"true": "false", "false": "true"},
}
NUMBER = re.compile(r"(?<![\w.\"'])(\d+\.\d+f?|0x[0-9a-f]+|\d+)(u?)(?![\w.'])")
OPERANDS = re.compile(
    r"(?<![\w.\])>*/%-] )(?<![\w.\])>])([\w.]+(?:\[\w+\])?) (-|/|%|<<) ([\w.]+(?:\[\w+\])?)(?! [*/%])(?![\w.(\[<])"
)
DECLARES = re.compile(
    r"(return|using|typedef|const|constexpr|static|auto|struct|class|enum|break|continue|throw|template|case|default|else|do|"
    r"public|private|explicit|friend|inline|namespace|extern|goto)\b"
    r"|(u?int\d*_t|int|float|double|bool|char|size_t|std::\w+<[^;]*>|[A-Z]\w*(<[^;]*>)?)"
    r"[ &*]+(const )?\w+( =|\{|\(|;|\[|,)"
)
CHECKS = re.compile(r"(SWITCHGEAR_CHECK|check_\w+|call\.(in|out)put|call\.own|output|check_overlap)\b")


def masked(source: str) -> str:
    """The source with spaces in place of comments, strings, characters and preprocessor lines."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|(?<!\d)\'(?:\\.|[^\'\\\n])\'|^[ \t]*#[^\n]*'
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m[0]), source, flags=re.DOTALL | re.MULTILINE)


# ---- kinds ----------------------------------------------------------------------------------------------------------


def replaced(code: str) -> Iterator[Edit]:
    for kind, table in REPLACED.items():
        for before, after in table.items():
            edges = ("", "") if before.startswith(" ") else (r"\b", r"\b")
            for m in re.finditer(edges[0] + re.escape(before) + edges[1], code):
                if after != "floor_div":
                    yield kind, m.start(), m.end(), after
                elif len(arguments := split_arguments(code, m.end())) == 2:
                    (a, b), (c, d) = arguments
                    yield kind, m.start(), d + 1, f"(({code[a:b]}) / ({code[c:d]}))"


def numbers(code: str) -> Iterator[Edit]:
    for m in NUMBER.finditer(code):
        digits, suffix = m.groups()
        if "." in digits:
            value = float(digits.rstrip("f"))
            after = f"{1.0 if value == 0 else 0.0 if value == 1 else value * 2}{'f' if digits.endswith('f') else ''}"
        else:
            value = int(digits, 0)
            after = str({0: 1, 1: 0}.get(value, value + 1)) + suffix
        yield "number", m.start(), m.end(), after


def swapped_operands(code: str) -> Iterator[Edit]:
    for m in OPERANDS.finditer(code):
        if m[1] != m[3]:
            yield "operands", m.start(), m.end(), f"{m[3]} {m[2]} {m[1]}"


def split_arguments(code: str, begin: int) -> list[tuple[int, int]]:
    """The ranges of the arguments of the call whose parenthesis opens at `begin`."""
    if code[begin : begin + 1] != "(":
        return []
    ranges, depth, start = [], 0, begin + 1
    for i in range(begin, len(code)):
        if code[i] in "([{":
            depth += 1
        elif code[i] in ")]}":
            depth -= 1
        if (code[i] == "," and depth == 1) or depth == 0:
            ranges.append((start + len(code[start:i]) - len(code[start:i].lstrip()), i))
            start = i + 1
        if depth == 0:
            return ranges
    return []


def swapped_arguments(code: str) -> Iterator[Edit]:
    simple = re.compile(r"[\w.:>*&\[\]+ -]+$")
    for m in re.finditer(r"(?<=[a-z_])\(", code):
        for (a, b), (c, d) in zip(ranges := split_arguments(code, m.start()), ranges[1:]):  # noqa: B905
            first, second = code[a:b], code[c:d]
            declares = re.match(r"(const |[\w:]+[ &*]+\w+$)", first)
            if first != second and not declares and simple.match(first) and simple.match(second):
                yield "arguments", a, d, second + code[b:c] + first


def negated_conditions(code: str) -> Iterator[Edit]:
    for m in re.finditer(r"\b(?:if|while) \(", code):
        ranges = split_arguments(code, m.end() - 1)
        if ranges and ";" not in code[ranges[0][0] : ranges[-1][1]]:
            begin, end = ranges[0][0], ranges[-1][1]
            yield "condition", begin, end, f"!({code[begin:end]})"


def statements(code: str) -> Iterator[tuple[int, int]]:
    """Ranges of statements that end with a semicolon: after a brace or semicolon of the same block."""
    blocks: list[tuple[str, int]] = [("{", 0)]
    for i, c in enumerate(code):
        if c in "({[":
            blocks.append((c, i + 1))
        elif c in ")}]" and len(blocks) > 1:
            blocks.pop()
            if c == "}" and blocks[-1][0] == "{" and not re.match(r"\s*[;,.)\[(]", code[i + 1 : i + 3]):
                blocks[-1] = ("{", i + 1)
        elif c == ";" and blocks[-1][0] == "{":
            start = blocks[-1][1]
            yield start + len(code[start:i]) - len(code[start:i].lstrip()), i + 1
            blocks[-1] = ("{", i + 1)


def dropped(code: str) -> Iterator[Edit]:
    for begin, end in statements(code):
        text = code[begin:end]
        indented = code[:begin].rpartition("\n")[2]
        if not indented or text.count("\n") > 4 or text == ";" or DECLARES.match(text) or "= delete" in text:
            continue
        if re.match(r"if \(.*\) (return|break|continue|throw)\b", text, re.DOTALL) or CHECKS.match(text):
            yield "check", begin, end, ";"
        elif not text.startswith(("for", "while", "#")):
            yield "statement", begin, end, ";"


# ---- all of a file --------------------------------------------------------------------------------------------------


def mutations(file: str, source: str) -> list[Mutation]:
    code = masked(source)
    edits = [
        edit
        for make in (replaced, numbers, swapped_operands, swapped_arguments, negated_conditions, dropped)
        for edit in make(code)
    ]
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for kind, begin, end, after in sorted(edits, key=lambda edit: (edit[1], edit[0])):
        first = source.rfind("\n", 0, begin) + 1
        text = source[first : source.find("\n", begin)].strip()
        if re.match(r"(static_assert|using|namespace|template|#)", text):
            continue
        line = source.count("\n", 0, begin) + 1
        label = "dropped" if after == ";" else " -> ".join(" ".join(s.split()) for s in (source[begin:end], after))
        seen[line, label] += 1
        if seen[line, label] > 1:
            label += f" [{seen[line, label]}]"
        found.append(Mutation(file, line, text, kind, begin, end, after, label))
    return found


# ---- selection ------------------------------------------------------------------------------------------------------


def rank(mutation: Mutation, seed: int) -> str:
    """A random order that edits of other lines do not change."""
    key = f"{seed}/{mutation.file}/{mutation.text}/{mutation.label}"
    return hashlib.sha256(key.encode()).hexdigest()


def selection(all_of_file: dict[str, list[Mutation]], count: int, seed: int) -> list[Mutation]:
    """About `count` mutations: of each file in proportion to the square root of their number, its kinds in turns."""
    sizes = {file: len(found) ** 0.5 for file, found in all_of_file.items()}
    chosen: list[Mutation] = []
    for file, found in sorted(all_of_file.items()):
        share = max(1, round(count * sizes[file] / sum(sizes.values())))
        chosen += in_turns(found, seed)[:share]
    return chosen


def in_turns(found: Iterable[Mutation], seed: int) -> list[Mutation]:
    turn: defaultdict[str, int] = defaultdict(int)
    order = []
    for mutation in sorted(found, key=lambda m: (rank(m, seed), m.line)):
        turn[mutation.kind] += 1
        order.append((turn[mutation.kind], rank(mutation, seed), mutation))
    return [mutation for *_, mutation in sorted(order, key=lambda entry: entry[:2])]


# ---- ledger ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Equivalent:
    """Mutations that no test could detect: of a line's text, all ("*") or one label; or of a whole file (text "*")."""

    file: str
    text: str
    label: str
    reason: str

    def covers(self, mutation: Mutation) -> bool:
        return self.file == mutation.file and self.text in ("*", mutation.text) and self.label in ("*", mutation.label)


def read_ledger(text: str) -> list[Equivalent]:
    """A file's name; indented by two, the text of a line; indented by four, `label  # reason`."""
    entries = []
    at = Equivalent("", "", "", "")
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        indent = len(line) - len(line.lstrip())
        if indent == 0:
            at = replace(at, file=line)
        elif indent == 2:
            at = replace(at, text=line.strip())
        else:
            label, _, reason = line.strip().partition("  # ")
            if indent != 4 or not reason:
                raise ValueError(f"expected `label  # reason`, indented by four, got {line!r}")
            entries.append(replace(at, label=label, reason=reason))
    return entries
