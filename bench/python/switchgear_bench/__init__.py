# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench`: MoE layers, routing policies and parallel experts, timed against other implementations."""
