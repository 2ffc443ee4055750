# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear train-tiny`: a small MoE model, trained on real text until compressing it means something.

No package ships a pretrained MoE model, and an untrained one cannot tell a good pruning from a bad one. This one is
an OLMoE that reads bytes, trained in ten minutes on two cores on four domains of text that the machine has. It is
accepted by its sensitivity (sensitivity.py), not by its loss.
"""
