# SPDX-License-Identifier: BSD-3-Clause
"""lm-evaluation-harness: log-likelihoods of text have the same scores on both implementations."""

from __future__ import annotations

import lm_eval
import small
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import switchgear.integrations.transformers  # noqa: F401  registers experts_implementation="switchgear"


def score(experts_implementation: str) -> float:
    """The mean log-likelihood of the second half of each piece of text, given the first."""
    model = small.model(experts_implementation).eval()
    harness = HFLM(pretrained=model, tokenizer=small.tokenizer(), batch_size=8)
    texts = [bytes(piece["input_ids"].tolist()).decode("latin-1") for piece in small.pieces()]
    requests = [
        Instance("loglikelihood", doc={}, arguments=(text[: small.LENGTH // 2], text[small.LENGTH // 2 :]), idx=i)
        for i, text in enumerate(texts)
    ]
    found = harness.loglikelihood(requests, disable_tqdm=True)
    return sum(value for value, _ in found) / len(found)


if __name__ == "__main__":
    print("lm-evaluation-harness", lm_eval.__version__)
    small.compare("lm-evaluation-harness", score, 1e-2)  # of a sum of 128 log-probabilities in float32
