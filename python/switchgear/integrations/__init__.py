# SPDX-License-Identifier: BSD-3-Clause
"""Drop-in points for other libraries. `switchgear.integrations.transformers` serves Hugging Face transformers."""
