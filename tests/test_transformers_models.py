# SPDX-License-Identifier: BSD-3-Clause
"""Every MoE type of the installed transformers on switchgear against transformers' own loop, forward and backward."""

import pytest

from compare_models import compare
from pages.model_types import experts_classes
from switchgear.integrations.undecorated import NOT_EXPERTS
from tiny_configs import MODEL_TYPES
from tiny_models import build, example_inputs

# max |got - want| / max |want| in float32. There are a few consecutive sums of 32 to 64 terms, so rounding explains a
# few ulps (1.2e-7); a wrong gate, order or weight gives more than 1e-3.
BOUND = 1e-5

# With transformers' own loop, one ulp of noise in the embeddings moves the gradients of these by 1e-5 to 1e-2.
AMPLIFYING = ("diffusion_gemma", "gemma4_text", "muse_spark")

pytestmark = pytest.mark.xdist_group("models")  # the last test wants the others in its process
seen: set[str] = set()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_model_agrees_with_transformers(model_type: str) -> None:
    model = build(model_type)
    result = compare(model, example_inputs(model))
    seen.update(replacement.class_name for replacement in result.replacements)
    assert {replacement.path for replacement in result.replacements} <= {"moe", "grouped_gemm"}
    assert max(result.modules) <= BOUND
    if model_type not in AMPLIFYING:
        assert max(result.model) <= BOUND


def test_every_experts_class_was_run() -> None:
    if len(seen) < len(MODEL_TYPES) // 2:
        pytest.skip("needs the models above to have run in this process")
    known = seen | {name.split(".")[-1] for name in NOT_EXPERTS}
    assert experts_classes() - known == set()
