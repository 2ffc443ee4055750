# SPDX-License-Identifier: BSD-3-Clause
"""Scores, selections, limits, losses and controllers of single papers."""
