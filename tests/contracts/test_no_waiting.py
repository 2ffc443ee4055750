# SPDX-License-Identifier: BSD-3-Clause
"""The host never waits for a device between a layer's input and its output, and no output's shape depends on data: a
lint of the sources, and every op on the meta device, which has no values. Needs no GPU."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from native_calls import OPS, function_of
from test_registration import sample
from torch import Tensor
from torch.utils import _pytree as pytree

from switchgear import ops

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python/switchgear"

# ---- Python ----------------------------------------------------------------------------------------------------------

# What a layer runs on a device. The rest of the reference, for float64 and devices without kernels, waits.
FOLDERS = ("autograd", "functional", "ops", "routing", "layers", "papers")
FILES = (
    "modules.py", "experts.py", "reference/policies.py", "weights/weight.py", "weights/module.py",
    "weights/adapted.py", "weights/selected.py",
    "offload/waves.py", "integrations/experts.py", "integrations/choices.py", "integrations/hook_points.py",
    "adapters/lora_experts.py",
)  # fmt: skip
IN_FOLDERS = sorted(path for name in FOLDERS for path in (PACKAGE / name).rglob("*.py"))
HOT = [PACKAGE / file for file in FILES] + IN_FOLDERS

# Methods and functions of torch that wait for a device, or whose result has a size that depends on data.
WAITING = {
    "argwhere", "bincount", "cpu", "item", "masked_select", "nonzero", "numpy", "synchronize", "tolist", "unique",
    "unique_consecutive",
}  # fmt: skip
# int(x.max()), or `if mask.any():`, reads a number back.
REDUCTIONS = {"all", "any", "argmax", "argmin", "count_nonzero", "equal", "isfinite", "max", "min", "sum"}

# "file function": why it may wait.
ALLOWED = {
    "functional/layer.py _check_both_trained": "two lists of experts that are not the same tensor",
    "offload/waves.py _cast": "autocast of experts in a cache, which waits for them anyway: only those in use",
    "offload/waves.py LayerInWaves._part": "experts of a cache, which waits for its choices anyway: those of a wave",
    "integrations/experts.py ExpertLinears.project": "calls a linear layer with the rows of each expert: as_linears",
    "integrations/hook_points.py _JetMoe.write": "its layers take the numbers of tokens as a list",
    "papers/layers/monet.py MonetExperts.disable": "called between steps",
    "reference/policies.py assign_balanced": "ends early on the CPU only",
    "reference/policies.py assign_capped": "ends early on the CPU only; layers pass longest and largest",
    "routing/context.py sequences": "sequence_ids without num_sequences, as docs/routing.md says",
    "routing/expert_choice.py ExpertChoice.__call__": "without max_experts_per_token, as docs/routing.md says",
    "routing/expert_choice.py ExpertChoice._capped": "sequences of different lengths, as docs/routing.md says",
    "papers/parts/masks.py ClusterDropout.fill_buffers": "once, when a layer is built",
    "papers/parts/masks.py TokenIdMask.of_frequencies": "once, when a layer is built",
    "routing/ranking.py from_pairs": "without max_experts_per_token, as its docstring says",
    "routing/ranking.py trim": "on the CPU only",
}


def waits(tree: ast.AST) -> Iterator[tuple[str, int, str]]:
    """(function, line, what) of everything that waits."""

    def visit(node: ast.AST, function: str) -> Iterator[tuple[str, int, str]]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            function = f"{function}.{node.name}".lstrip(".")
        for what in _waits_of(node):
            yield function, getattr(node, "lineno", 0), what
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    return visit(tree, "")


def _waits_of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Call):
        name = _method(node)
        if name in WAITING:
            yield name
        if isinstance(node.func, ast.Name) and node.func.id in ("int", "float", "bool") and _reduces(node.args):
            yield f"{node.func.id} of a result"
    elif isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)):
        if _reduces([node.test]):
            yield "a condition on a result"
    elif isinstance(node, ast.Subscript) and _is_mask(node.slice):
        yield "indexing by a mask"


def _method(call: ast.Call) -> str | None:
    return call.func.attr if isinstance(call.func, ast.Attribute) else None


def _reduces(nodes: list[ast.expr]) -> bool:
    """Whether the value is a reduction of a tensor: x.any(), not x.any(), x.sum() > 0, a and x.any()."""
    for node in nodes:
        parts: list[ast.expr] = []
        if isinstance(node, ast.BoolOp):
            parts = node.values
        elif isinstance(node, ast.UnaryOp):
            parts = [node.operand]
        elif isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.BinOp):
            parts = [node.left, node.right]
        elif isinstance(node, ast.Call) and _method(node) in REDUCTIONS:
            return True
        if parts and _reduces(parts):
            return True
    return False


def _is_mask(index: ast.expr) -> bool:
    if isinstance(index, ast.UnaryOp):
        return isinstance(index.op, ast.Invert)
    if isinstance(index, ast.BinOp):
        return isinstance(index.op, ast.BitAnd)
    names = ("mask", "keep", "kept", "valid", "present")
    return isinstance(index, ast.Compare) or (isinstance(index, ast.Name) and index.id in names)


def found_in(path: Path) -> dict[str, list[str]]:
    """What waits in a file, by "file function"."""
    name = path.relative_to(PACKAGE).as_posix()
    found: dict[str, list[str]] = {}
    for function, line, what in waits(ast.parse(path.read_text())):
        found.setdefault(f"{name} {function}", []).append(f"line {line}: {what}")
    return found


def test_python_never_waits() -> None:
    found = {place: lines for path in HOT for place, lines in found_in(path).items()}
    assert {place: lines for place, lines in found.items() if place not in ALLOWED} == {}
    assert sorted(ALLOWED) == sorted(found), "a place that no longer waits is still allowed"


@pytest.mark.parametrize(
    "line",
    [
        "x.item()", "x.cpu()", "x.tolist()", "torch.nonzero(x)", "torch.cuda.synchronize()", "n = int(x.sum())",
        "x[x > 0]", "x[~mask]", "x[mask] = 0", "y = 1 if x.any() else 2", "x[a & b]",
        "while not (done.all() or late): pass", "assert x.max() < 3", "torch.unique(x)", "bool((x > 0).any())",
    ],
)  # fmt: skip
def test_the_lint_finds(line: str) -> None:
    assert list(waits(ast.parse(line)))


@pytest.mark.parametrize(
    "line", ["int(x.shape[0])", "if x.numel() == 0: pass", "x[:, 0]", "x[index]", "if x.is_cpu and x.dim() > 1: pass"]
)
def test_the_lint_does_not_find(line: str) -> None:
    assert not list(waits(ast.parse(line)))


# ---- launchers -------------------------------------------------------------------------------------------------------

WAITING_IN_CUDA = re.compile(
    r"\b(cuda(?:Device|Stream|Event|Thread)Synchronize|cudaMemcpy(?:2D|3D)?|cudaMemset|cudaMalloc\w*|cudaFree\w*"
    r"|cudaStreamQuery|cudaEventQuery|thrust)\b"
)
ALLOWED_IN_CUDA = {"probe.cu": "runs once for a device, before its first op"}
LAUNCHERS = sorted((ROOT / "csrc/cuda").glob("*.*"))


def waiting_in_cuda(text: str) -> list[str]:
    code = "\n".join(line.split("//")[0] for line in text.splitlines())
    return WAITING_IN_CUDA.findall(code)


def test_launchers_never_wait() -> None:
    found = {path.name: names for path in LAUNCHERS if (names := waiting_in_cuda(path.read_text()))}
    assert set(found) == set(ALLOWED_IN_CUDA), found
    assert waiting_in_cuda("  cudaStreamSynchronize(stream);") == ["cudaStreamSynchronize"]
    assert not waiting_in_cuda("  cudaMemcpyAsync(a, b, n, kind, stream);  // cudaMemcpy would wait")


# ---- shapes ----------------------------------------------------------------------------------------------------------


def outline(outputs: Any) -> list[tuple[Any, ...] | None]:
    """Shape, strides and dtype of each output."""
    return [
        (tuple(out.shape), out.stride(), out.dtype) if isinstance(out, Tensor) else None
        for out in pytree.tree_leaves(outputs)
    ]


@pytest.mark.parametrize("op", OPS)
def test_shapes_do_not_depend_on_data(op: str) -> None:
    """An op has the outputs of the meta device, whatever its arguments contain."""
    for seed in range(4):
        function, args = getattr(ops, function_of(op)), sample(op, seed)
        without_data = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), args)
        assert outline(function(*args)) == outline(function(*without_data))
