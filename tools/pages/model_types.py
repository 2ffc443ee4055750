# SPDX-License-Identifier: BSD-3-Clause
"""Writes docs/model_types.md: every MoE type of the installed transformers, run both ways.

PYTHONPATH=tests python tools/pages/model_types.py [path]
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import switchgear
from compare_models import Comparison, compare
from switchgear.integrations.gates import find_gate
from switchgear.integrations.undecorated import NOT_EXPERTS, PATCHES, find_patch
from switchgear.ops import GluOptions
from tiny_configs import MODEL_TYPES
from tiny_models import build, example_inputs

REMARKS = {
    "DbrxExperts": "w1, v1 and w2 are stored as [E·I, H]; read as views",
    "JetMoeMoE": "bias after the sum",
    "JetMoeParallelExperts": "the projections of its attention experts",
    "Llama4TextMoe": "the router's score scales the input of the expert",
    "LongcatFlashExperts": "zero experts return their input",
    "NllbMoeExperts": "one nn.Linear per expert; transformers 5.24 sends every token to experts 0 and 1, and so do we",
    "Step3p7Experts": "grouped_gemm on layers that clamp after the activation",
    "SwitchTransformersExperts": "one nn.Linear per expert; top-1 with capacity",
    "VitPoseNaiveMoe": "one expert per image, a single linear layer",
    "Qwen3OmniMoeTalkerTextExperts": "no auto class loads it: the experts module by itself",
}

PAGE = """# Hugging Face model types

Every model type of transformers {transformers} with routed experts, as a tiny random model in float32: run by
transformers' own loop over the experts (`experts_implementation="eager"`), then by {backend}
after `switchgear.accelerate(model)`, with the same weights and inputs.

- **path**: `moe` is the fused kernel; `grouped_gemm` runs the model's own gate between two grouped matrix products,
  because no kernel has that gate, or because something else stands in between. "patched" marks classes without
  transformers' decorator: they need `switchgear.accelerate(model)`, since transformers ignores
  `experts_implementation="switchgear"` there.
- **difference**: max |ours - theirs| / max |theirs| over the experts modules, each fed the inputs that it had in the
  model: the largest of the output and all gradients (of every parameter, the hidden states and the router's weights),
  and of all types of the row.

This page is generated: `PYTHONPATH=tests python tools/pages/model_types.py docs/model_types.md`

| model types | path | gate | difference | remark |
|---|---|---|---:|---|
{rows}

Not replaced: {not_experts}.
"""


def experts_classes() -> set[str]:
    """Experts classes in the sources of the installed transformers: decorated ones, and those that we patch."""
    decorated = re.compile(r"^@use_experts_implementation[^\n]*\nclass (\w+)", re.MULTILINE)
    sources = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    found = {name for source in sources for name in decorated.findall(source.read_text(encoding="utf-8"))}
    return found | {name.split(".")[-1] for name in PATCHES}


def _kind(class_name: str, model: nn.Module, result: Comparison) -> tuple[str, str, str]:
    """Path, gate and remark of a class of experts."""
    replaced = [replacement for replacement in result.replacements if replacement.class_name == class_name]
    paths = " / ".join(sorted({replacement.path for replacement in replaced}, reverse=True))
    patched = any(name.endswith(f".{class_name}") for name in PATCHES)
    module: Any = model.get_submodule(replaced[0].name)
    return paths + " (patched)" * patched, _gate(module), _remark(module)


def _gate(module: Any) -> str:
    """The gate in words: "silu", "swiglu_oai, limit 7, interleaved", or "own"."""
    patch = find_patch(module)
    if patch is not None and patch.gate is None:
        return "own"
    gate: GluOptions | None = find_gate(module if patch is None else module.get_submodule(patch.gate))
    if gate is None:
        return "own"
    limit = f", limit {gate.limit:g}" if gate.limit else ""
    return f"{gate.activation}{limit}" + ", interleaved" * gate.interleaved + ", ungated" * (not gate.gated)


def _remark(module: Any) -> str:
    flags = {"is_transposed": "transposed", "has_bias": "bias", "has_post_expert_norm": "norm after the experts"}
    remarks = [words for flag, words in flags.items() if getattr(module, flag, False)]
    return "; ".join([*remarks, *filter(None, [REMARKS.get(type(module).__name__)])])


def table() -> str:
    """The page's text. Takes minutes: about eighty models run four times each."""
    kinds: dict[tuple[str, str, str], dict[str, float]] = {}
    seen: set[str] = set()
    for model_type in MODEL_TYPES:
        model = build(model_type)
        result = compare(model, example_inputs(model))
        classes = {replacement.class_name for replacement in result.replacements}
        for class_name in classes:
            kinds.setdefault(_kind(class_name, model, result), {})[model_type] = max(result.modules)
        seen |= classes
        print(f"{len(seen):3} {model_type}", file=sys.stderr)
    rows = []
    for (path, gate, remark), found in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
        rows.append(f"| {', '.join(found)} | {path} | {gate} | {max(found.values()):.1e} | {remark} |")
    rows += [f"| ? | {name} is absent from MODEL_TYPES ||||" for name in sorted(experts_classes() - seen)]
    not_experts = "; ".join(f"{name.split('.')[-1]} ({reason})" for name, reason in NOT_EXPERTS.items())
    backend = f"switchgear {switchgear.__version__} ({switchgear.backend()}, {switchgear.cpu_isa()})"
    return PAGE.format(
        transformers=transformers.__version__, backend=backend, rows="\n".join(rows), not_experts=not_experts
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)  # deprecations inside transformers' models
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)  # for models this small, waking threads costs ten times the computation
    Path(sys.argv[1] if len(sys.argv) > 1 else "docs/model_types.md").write_text(table(), encoding="utf-8")
