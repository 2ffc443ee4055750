# SPDX-License-Identifier: BSD-3-Clause
"""Integrations with other libraries. `switchgear.integrations.transformers` is for Hugging Face transformers."""
