# SPDX-License-Identifier: BSD-3-Clause
"""vLLM on a CPU: its experts by an out-of-tree method, with the same log-probabilities."""

import os
import tempfile

# The engine runs in this process, which has the method, and needs little memory.
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1")

import small
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod as Method

import switchgear


class SwitchgearMethod(Method):  # type: ignore[misc, no-any-unimported]
    is_monolithic = False  # vLLM routes

    def process_weights_after_loading(self, layer):  # type: ignore[no-untyped-def]
        """Weights stay as they are loaded: [E,2I,H] and [E,H,I]."""

    def forward_native(self, layer, x, topk_weights, topk_ids, **_):  # type: ignore[no-untyped-def]
        return switchgear.moe(x, layer.w13_weight, layer.w2_weight, topk_ids, topk_weights)


def engine(folder: str) -> LLM:  # type: ignore[no-any-unimported]
    return LLM(folder, dtype="bfloat16", enforce_eager=True, max_model_len=small.LENGTH)


def log_probability(engine: LLM) -> float:  # type: ignore[no-any-unimported]
    prompts = [{"prompt_token_ids": piece["input_ids"].tolist()[:-1]} for piece in small.pieces()]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    tokens = [next(iter(token.values())).logprob for output in outputs for token in output.prompt_logprobs[1:]]
    return sum(tokens) / len(tokens)


with tempfile.TemporaryDirectory() as folder:
    small.model("eager").save_pretrained(folder)
    engines = {"vLLM's own": engine(folder)}
    Method.register_oot(SwitchgearMethod)
    engines["switchgear"] = engine(folder)
print({name: log_probability(engine) for name, engine in engines.items()})  # also warms up
small.compare("vLLM", lambda name: log_probability(engines[name]), tolerance=1e-2, default="vLLM's own")
