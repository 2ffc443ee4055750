# SPDX-License-Identifier: BSD-3-Clause
"""Helpers for modules: float32 buffers, sharded parameters, functions left out of graphs, eval(), functions of other
libraries that are extended, and models inside wrappers."""
