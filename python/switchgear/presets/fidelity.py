# SPDX-License-Identifier: BSD-3-Clause
"""How close each preset is to its paper: its group on the page, the paper's number in the list that the names of tests
use (test_row49_…), what the formula rests on, and the constants that could not be confirmed in the paper."""

from __future__ import annotations

from typing import NamedTuple

GROUPS = ("score", "selection", "capacity", "balance", "structure", "adapter", "model")

PAPER = "formula of the paper"
CODE = "formula of its code"
OURS = "a choice of ours"


class Fidelity(NamedTuple):
    group: str
    number: int | None  # None: not a paper of the list
    formula: str
    unverified: str = ""


FIDELITY = {
    "adamoe": Fidelity(
        "structure", 8, f"{PAPER}; constants: {CODE}, which averages the null experts' load along another axis"
    ),
    "autonomy_of_experts": Fidelity("score", 23, f"{PAPER}; normalize=False: {CODE}"),
    "base_layer": Fidelity("selection", 6, f"{PAPER}; the auction's bids and tolerance: {OURS}"),
    "batch_independent": Fidelity("capacity", 79, "the paper's defence: no capacity"),
    "bounded_gate": Fidelity("score", 24, f"{PAPER}; which bounded transform: {OURS}", "transform"),
    "capacity_aware": Fidelity(
        "capacity",
        36,
        f"{PAPER}, reroute of its first version; which scores rank, and all experts as candidates: {CODE}",
        "gamma",
    ),
    "cartesian": Fidelity("structure", 27, PAPER, "top_k, num_shared_experts, balance"),
    "cluster_task": Fidelity("selection", 32, PAPER),
    "deep_mixture": Fidelity(
        "structure",
        26,
        f"the cap: {PAPER}, with the totals from before each call; linear gates and experts of two layers: {OURS}",
        "margin",
    ),
    "deepseek_moe": Fidelity("structure", 3, PAPER),
    "deepseek_v3": Fidelity(
        "model",
        None,
        f"{PAPER} and of the code in Hugging Face transformers; the loss counts the experts that tokens use; the "
        f"paper counts those of the largest scores, whatever bias and groups choose: {OURS}",
    ),
    "dynamic_top_p": Fidelity("selection", 7, f"{PAPER}; its code takes one expert more if the sum meets p exactly"),
    "expert_choice": Fidelity("selection", 2, PAPER),
    "global_balance": Fidelity("balance", 5, PAPER, "top_k, balance"),
    "gpt_oss": Fidelity("model", None, "formula of the code in Hugging Face transformers"),
    "gradient_conflict": Fidelity(
        "balance", 21, f"test of conflict: {PAPER}; loss: {OURS}", "the tau of GradientConflict, balance"
    ),
    "grin": Fidelity("selection", 12, "formula of the code of Phi-3.5-MoE in Hugging Face transformers", "balance"),
    "gshard": Fidelity(
        "selection",
        None,
        f"{PAPER}, without random second experts; the loss counts both choices: {OURS}",
        "capacity_factor, balance",
    ),
    "gumbel_gate": Fidelity("selection", 25, f"{PAPER}; bias, tau, samples: {CODE}"),
    "gw_moe": Fidelity(
        "selection",
        19,
        f"{PAPER}; its Switch code multiplies the experts' input instead, and counts the best expert alone in the loss",
    ),
    "hmoe": Fidelity(
        "structure", 9, f"{PAPER}; widths relative to their mean in the penalty, and the entropy per token: {OURS}"
    ),
    "isolated_expert_choice": Fidelity("capacity", 80, "the paper's defence: competition within a sequence"),
    "llama4": Fidelity("model", None, "formula of the code in Hugging Face transformers"),
    "locmoe": Fidelity(
        "score",
        14,
        f"score: {PAPER}; the loss is its divergence reversed, as the printed one is infinite: {OURS}",
        "top_k, locality, the unit of min_capacity",
    ),
    "loramoe": Fidelity(
        "adapter",
        64,
        f"{PAPER}; its code has a dropout mask for each expert, and the unbiased variance over mean² as the loss",
        "delta, balance",
    ),
    "loss_free": Fidelity("balance", 4, f'{PAPER}; rule "proportional" divides by the mean load: {OURS}'),
    "maskmoe": Fidelity("selection", 16, PAPER, "frequent_from, top_k, balance"),
    "merged": Fidelity("structure", 49, f"{PAPER}; other options: of its code; pooling: {OURS}"),
    "mixtral": Fidelity("model", None, f"{PAPER} and of the code in Hugging Face transformers"),
    "mixture_of_depths": Fidelity("structure", None, f"{PAPER}, for a feed-forward block", "balance"),
    "moe_plus_plus": Fidelity(
        "structure",
        None,
        f"{PAPER}; initial values, no capacity by default: {OURS}; "
        "its code weighs null experts, scales x and routes otherwise",
        "tau, balance, capacity_factor",
    ),
    "moe_x": Fidelity("score", 22, f"{PAPER}; sign and normalisation of the score: {OURS}", "scale, top_k"),
    "moec": Fidelity(
        "balance",
        20,
        f"loss and constants: {CODE}, with means over tokens for its sums; losses of the learned temperature, and the "
        f"softmax as weight, without the rest of the input: {OURS}",
    ),
    "monet": Fidelity("structure", 30, f"{PAPER} and of its code, without auxiliary losses"),
    "mor1e": Fidelity("adapter", 66, f"rank-1 experts: {PAPER}; form of the prior: {OURS}", "top_k, weight, tau"),
    "multi_head": Fidelity("structure", 28, f"{PAPER}; 4 heads: of the paper before it, arXiv:2404.15045", "balance"),
    "octavius": Fidelity(
        "adapter",
        65,
        f"{PAPER}; rank, dropout, top_k, weights, no bias: {CODE}, which has shared_router=True; "
        f"the mean of a sequence without dim: {OURS}",
    ),
    "openmoe": Fidelity(
        "balance",
        35,
        f"{PAPER}; first choices first, evaluation_factor, min_capacity: of training code; capacity rounded up: {OURS}",
        "capacity_factor",
    ),
    "phatgoose": Fidelity("adapter", 68, f"{PAPER}; learning rate of train_gate: {CODE}, whose warm-up it lacks"),
    "phimoe": Fidelity(
        "model",
        None,
        "formula of the code in Hugging Face transformers; input_jitter reaches the router alone, there also the "
        "experts, drawn twice",
    ),
    "pmoe": Fidelity(
        "selection",
        33,
        f"{PAPER}; its code for CIFAR-10 and CelebA takes the softmax over all patches before the choice",
    ),
    "qwen3": Fidelity("model", None, "formula of the code in Hugging Face transformers"),
    "remoe": Fidelity("selection", None, f"{PAPER}; a coefficient for each layer instead of one for all: {OURS}"),
    "sam": Fidelity("selection", 15, f"{PAPER}; the form of alignment: {OURS}", "balance, alignment"),
    "self_moe": Fidelity("adapter", 69, f"{PAPER}; a router for each width of input: {OURS}", "rank, top_k"),
    "sigma_moe": Fidelity(
        "score", 11, f"{PAPER}, with its initial values; their factor √(2 / num_layers) only if num_layers is given"
    ),
    "skywork": Fidelity(
        "score",
        13,
        f"{PAPER}; population deviation, and SwitchLoss instead of the printed Σ_e (1/E - P_e)²: {OURS}",
        "capacity_factor, initial coefficient",
    ),
    "smola": Fidelity("adapter", 67, f"{PAPER}, with one set of experts for all modalities", "rank, slots"),
    "soft_moe": Fidelity("structure", 31, f"{PAPER} and of its code, whose slots are ⌈T / E⌉"),
    "stratified": Fidelity(
        "structure",
        29,
        f"{PAPER}; its code normalises the two weights, norms the block's output too, adds residuals after the norm, "
        "and divides the loss by the gates that tokens visit",
        "capacity in evaluation, which choices it keeps",
    ),
    "switch": Fidelity("selection", 1, f"{PAPER}; evaluation_factor, jitter, min_capacity: of its code"),
    "task_level": Fidelity(
        "score",
        34,
        f"{PAPER}; its code has a router of two layers (64 units, GELU), tau = max(2·exp(-3e-4·step), 0.1), and noise "
        "in evaluation too",
        "tau",
    ),
    "thor": Fidelity("selection", 18, PAPER),
    "word_experts": Fidelity("structure", 17, f"{PAPER}; the table is random, the paper's follows frequencies"),
    "xmoe": Fidelity(
        "score", 10, f"{PAPER}; tau and balance_tau: of MoEC's code; torchscale does not use balance_tau", "balance"
    ),
}
