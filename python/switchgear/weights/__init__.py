# SPDX-License-Identifier: BSD-3-Clause
"""How the weights of experts and of linear layers are stored.

store(model, form) converts a model, restore(model) decodes it, encode(weight, form) converts one weight. `moe` takes
a Weight in place of a tensor. Forms: Plain, Panels, Compact (lossless); Int8, Int4, Groups, and those of minifloat.py.
See docs/weights.md.

weight.py   Weight; AdaptedWeight, which adds an adapter; SelectedWeight, of which some experts train; Operand
form.py     the base class Form; Layout, how a module holds its projections
exact.py, integers.py (Groups, too), minifloat.py, gguf.py: the forms
module.py   stored projections of a module, and its state dict
state.py    State, what switchgear keeps on a module; extend, for modules of other libraries
selected.py parameters of which some experts are trained alone; adapted.py: projections with low-rank adapters
store.py    all experts and linear layers of a model, and the choice of a form
"""

from switchgear.weights import gguf, minifloat  # noqa: F401  (gguf has forms without names of their own)
from switchgear.weights.exact import Compact, Panels, Plain
from switchgear.weights.form import Form, Layout, layout_of
from switchgear.weights.integers import Groups, Int4, Int8
from switchgear.weights.minifloat import *  # noqa: F403  (a new form needs no entry here)
from switchgear.weights.module import matrix_of, stored_of, weights_of
from switchgear.weights.state import FINDERS as _FINDERS
from switchgear.weights.store import Stored, encode, restore, store
from switchgear.weights.weight import (
    AdaptedWeight,
    SelectedWeight,
    Weight,
    advise_huge_pages,
    interleave_nodes,
    use_huge_pages,
)

FINDERS, HINTS = _FINDERS["layout"], _FINDERS["hint"]  # earlier names; `extend` adds to all of them

__all__ = [
    "AdaptedWeight",
    "Compact",
    "Form",
    "Groups",
    "Int4",
    "Int8",
    "Layout",
    "Panels",
    "Plain",
    "SelectedWeight",
    "Stored",
    "Weight",
    "advise_huge_pages",
    "encode",
    "interleave_nodes",
    "layout_of",
    "matrix_of",
    "restore",
    "store",
    "stored_of",
    "use_huge_pages",
    "weights_of",
    *minifloat.__all__,
]
