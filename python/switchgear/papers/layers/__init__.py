# SPDX-License-Identifier: BSD-3-Clause
"""Layers of single papers, composed of the router, the experts and the grouped matrix products."""
