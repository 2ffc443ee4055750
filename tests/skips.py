# SPDX-License-Identifier: BSD-3-Clause
"""The reasons for which a test may be skipped. conftest.py fails a run that skips one for any other reason, so no test
is skipped unnoticed: a new reason is a new line here."""

from __future__ import annotations

import re

ALLOWED = (
    # packages and tools
    r"(accelerate|cmake|gguf|jax|llama_cpp|matplotlib|mergekit|peft|rich|safetensors|scipy) is not installed",
    r"(switchgear_bench|tokenizers|tqdm|transformers) is not installed",
    r"(fastapi|openai|uvicorn) is not installed",
    r"scikit-build-core is not installed",
    r"needs peft and transformers: .*",
    r"needs transformers with (DistributedConfig|EPImplementation)",
    r"no FP8 experts in this version",
    r"this transformers has no (argument cache|[\w-]+)",
    r"this transformers decodes to another dtype",
    r"this torch has no (Muon|grouped_mm)",
    r"needs torch.nn.functional.grouped_mm \(torch 2.10\)",
    r"this torch cannot trace the attributes of a module",
    r"inductor needs a C\+\+ compiler",
    r"neither objdump nor llvm-objdump is installed",
    r"no cuobjdump and nvdisasm: .*",
    r"needs nvcc",
    # how switchgear was built
    r"built without the kernels for AMX",
    r"built without a CUDA module: .*",
    r"switchgear was built without its CUDA module .*",
    r"the module has no code for sm_\d+(, sm_\d+)*",
    r"SWITCHGEAR_SIMT names no module with the CUDA kernels",
    # the machine
    r"no \w+ kernels: this build on this processor has .*",
    r"the processor flushes no subnormal numbers",
    r"(needs a GPU|needs a GPU with more free memory|NCCL needs a GPU for each rank)",
    r"there is a CUDA (device|module) here",
    r"needs (fork|Linux|Linux on x86-64)",
    r"needs mmap of memory without reservation",
    r"needs 12 GB of available memory, there are .*",
    r"Linux says what the peak was",
    r"the system (gives no huge pages|has no list of nodes|does not interleave memory)",
    r"no control group can be made: .*",
    r"the kernel has no MADV_COLLAPSE .*",
    # where the sources are from
    r"not a clone of the repository",
    # what a device does not do
    r".* (is|are) for the CPU(, and weights on other devices are refused)?",
    r"values in device memory are not checked",
    r"\w+ with .* multiplications takes too long on simt",
    # what a model does not do
    r"this model does not generate",
    # which tests were selected
    r"needs the models above to have run in this process",
)


def is_allowed(reason: str) -> bool:
    return any(re.fullmatch(pattern, reason, re.DOTALL) for pattern in ALLOWED)
