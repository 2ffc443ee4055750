# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear demo`: train a small model with several experts implementations, and compare them."""
