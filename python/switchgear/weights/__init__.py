# SPDX-License-Identifier: BSD-3-Clause
"""How the weights of experts are stored.

store(model, form) and restore(model); encode(weight, form), one weight alone. A Weight is what `moe` and `grouped_gemm`
take in place of a tensor. Forms: Plain, Panels and Compact, without loss; Int8, Int4, Fp8, Mxfp4. See docs/weights.md.

weight.py   Weight, and AdaptedWeight around one
form.py     what a form is; plain.py, panels.py, compact.py, integers.py, minifloat.py: one or two each
module.py   what becomes of a module's projections, and of its state dict; layout.py: how it holds them
store.py    all experts of a model; auto.py: which form serves a use; pages.py: huge pages
"""

from switchgear.weights.compact import Compact
from switchgear.weights.form import Form
from switchgear.weights.integers import Int4, Int8
from switchgear.weights.layout import FINDERS, Layout, layout_of
from switchgear.weights.minifloat import Fp8, Mxfp4
from switchgear.weights.module import stored_of, weights_of
from switchgear.weights.pages import advise_huge_pages, use_huge_pages
from switchgear.weights.panels import Panels
from switchgear.weights.plain import Plain
from switchgear.weights.store import Stored, encode, restore, store
from switchgear.weights.weight import AdaptedWeight, Weight

__all__ = [
    "FINDERS",
    "AdaptedWeight",
    "Compact",
    "Form",
    "Fp8",
    "Int4",
    "Int8",
    "Layout",
    "Mxfp4",
    "Panels",
    "Plain",
    "Stored",
    "Weight",
    "advise_huge_pages",
    "encode",
    "layout_of",
    "restore",
    "store",
    "stored_of",
    "use_huge_pages",
    "weights_of",
]
