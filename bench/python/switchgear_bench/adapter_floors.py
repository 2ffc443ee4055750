# SPDX-License-Identifier: BSD-3-Clause
"""The least that adapters can cost beside their frozen base, by bytes or multiply-adds alone.

An expert has 3·H·I weights, and adapters of r·(H + 2I) + r·(I + H) elements: A and B of both projections. A forward
reads and multiplies each once. In a training step the base does so twice (forward, and gradients of its inputs), and
adapters three times: gradients of A and B cost what the forward costs, and are written for all experts, touched or not.
"""

from __future__ import annotations

from .shapes import Shape

MANY_ROWS = 20  # of an expert: with more, multiply-adds bind, with fewer, memory
BYTES = {"bf16": 2.0, "fp32": 4.0, "int4": 0.5 + 2 / 32, "mxfp4": 0.5 + 1 / 32}  # of a weight, scales included


def floor(shape: Shape, dtype: str, rank: int, tokens: int) -> float:
    """Of the base's time."""
    hidden, inner, experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
    weights, elements = 3 * hidden * inner, rank * (2 * hidden + 3 * inner)
    trains = tokens > 1
    if tokens * shape.top_k > MANY_ROWS * experts:
        return 1 + elements / weights * (3 / 2 if trains else 1)
    touched = experts * (1 - (1 - shape.top_k / experts) ** tokens)  # as each token chooses at random
    read, written = (2 * touched, experts) if trains else (touched, 0)
    of_adapters = (read + written) * elements * (4 if dtype == "fp32" else 2)
    return 1 + of_adapters / (read * weights * BYTES[dtype])
