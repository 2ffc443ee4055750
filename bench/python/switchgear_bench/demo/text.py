# SPDX-License-Identifier: BSD-3-Clause
"""The text and tables of the demo's report."""

from __future__ import annotations

from typing import Any

from switchgear.cli.common import markdown_table

from ..report import threads

Summary = dict[str, dict[str, float]]  # by implementation; see report.summarise


def _text(data: bytes) -> str:
    shown = (
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in data.decode("utf-8", "replace")
    )
    return "".join(shown)


def sample(results: dict[str, Any]) -> str:
    """The prompt, and each implementation's continuation."""
    texts = {name: run["generated"][1] for name, run in results["implementations"].items()}
    reference = texts[results["reference"]]
    parts = [f"===== prompt, from the held-out text =====\n{_text(reference['prompt'])}\n"]
    for name, text in texts.items():
        pairs = list(zip(text["sampled"], reference["sampled"], strict=True))
        same = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
        against = "" if text is reference else f", the first {same} of {len(pairs)} bytes as {results['reference']}"
        parts.append(f"===== {name}{against} =====\n{_text(text['sampled'])}\n")
    return "\n".join(parts)


def _training(summary: Summary, base: str) -> str:
    header = ["implementation", "tokens/s", "ms per step", f"vs {base}", "in experts, ms", "share", "forward",
              "backward", f"experts vs {base}", "peak memory", "held-out loss"]  # fmt: skip
    rows = [
        [name, f"{s['tokens_per_second']:,.0f}", f"{s['step']:.1f}", f"{summary[base]['step'] / s['step']:.2f}x",
         f"{s['experts']:.1f}", f"{s['experts'] / s['step']:.0%}", f"{s['experts_forward']:.1f}",
         f"{s['experts_backward']:.1f}", f"{summary[base]['experts'] / s['experts']:.2f}x",
         f"{s['peak_memory'] / 2**20:,.0f} MiB", f"{s['held_out_loss']:.4f}"]
        for name, s in summary.items()
    ]  # fmt: skip
    return markdown_table(header, rows)


def _generation(summary: Summary, base: str) -> str:
    header = ["implementation", "prefill ms", "in experts", "tokens/s", f"vs {base}", "decode ms/token", "in experts",
              "tokens/s", f"vs {base}"]  # fmt: skip
    rows = [
        [name, f"{s['prefill']:.2f}", f"{s['prefill_experts']:.2f}", f"{s['prefill_tokens_per_second']:,.0f}",
         f"{summary[base]['prefill'] / s['prefill']:.2f}x", f"{s['decode']:.3f}", f"{s['decode_experts']:.3f}",
         f"{s['decode_tokens_per_second']:,.0f}", f"{summary[base]['decode'] / s['decode']:.2f}x"]
        for name, s in summary.items()
    ]  # fmt: skip
    return markdown_table(header, rows)


def _checks(results: dict[str, Any]) -> str:
    rows = [
        [f"{name}: {c['what']}", f"{c['difference']:.1e}", f"{c['noise']:.1e}", f"{c['bound']:.1e}",
         "yes" if c["agrees"] else "**no**"]
        for name, run in results["implementations"].items() for c in run["checks"]
    ]  # fmt: skip
    return markdown_table(["check", f"distance to {results['reference']}", "twin's", "allowed", "agrees"], rows)


def report(results: dict[str, Any], summary: Summary, verdict: str, warm_up: int) -> str:
    """The text of report.md."""
    s, model, cpu, base = results["settings"], results["model"], results["machine"], results["reference"]
    rounds = results["implementations"][base]["generated"][1:]
    millions, share = model["parameters"] / 1e6, model["parameters_in_experts"] / model["parameters"]
    return f"""# switchgear demo: {s["family"]}

{verdict}.

- **Model**: {s["family"]}, {millions:.1f} M parameters, {share:.0%} of them in experts. {model["moe_layers"]} MoE
  layers of {model["layers"]}, hidden size {model["hidden_size"]}, {model["num_experts"]} experts of width
  {model["intermediate_size"]}, {model["top_k"]} per token. Weights and activations in {s["dtype"]}; a byte is a token.
- **Training**: {s["steps"]} steps of {s["batch_size"]} x {s["sequence_length"]} bytes from {results["text"]};
  AdamW, peak learning rate {s["learning_rate"]:g}, seed {s["seed"]}.
- **Machine**: {cpu["model"]}, {threads(s["threads"])}, torch {cpu["torch"]}, transformers {cpu["transformers"]}.

## Training speed

{_training(summary, base)}
![time per step](speed.png)

Medians over the steps after the first {warm_up}. A step is forward, backward and AdamW. *In experts* is wall-clock
time: from the call of an experts module to its return, and in the backward pass from the complete gradient of its
output to the complete gradients of its inputs, weight gradients included. Router, shared experts and optimizer are not
in it. Peak memory is the largest resident size of the implementation's own process up to the end of training. The
implementations took turns of a few steps, so that changes of the machine's speed hit all of them.

## Loss

![loss](losses.png)

{_checks(results)}
Correct implementations round differently, and training amplifies roundings. How much, shows a *twin* of {base} whose
initial weights were moved by one unit in the last place each. An implementation may be ten times as far from {base}
as its twin is or was, plus a floor of some roundings. *Gradients at the start*: norms and random projections of the
experts' gradients at equal weights, relative to the norms, the worst tensor. *Losses*: the step that comes closest to
its bound, as long as each expert has equally many tokens in both runs. Then a rounding sends some token to another
expert (dots in the plot), and the runs part faster than by roundings: the *mean loss* of the steps after may differ
by as much as {base}'s loss changes between batches. *Logits*: at equal trained weights, root mean square over the
prompt, relative. The held-out losses are those of each one's own training.

## Generation

{_generation(summary, base)}
All with the weights that {base} trained: a prompt of {len(rounds[0]["prompt"])} bytes, then byte by byte
([sample.txt](sample.txt)). Medians of {len(rounds)} rounds.

## Load of the experts

![load of the experts](expert_load.png)

The share of each expert in a layer's choices at each step, relative to an equal share; in the training of
{list(summary)[-1]}.
"""
