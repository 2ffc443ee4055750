# SPDX-License-Identifier: BSD-3-Clause
"""What only papers use: parts of routers (parts) and layers (layers). switchgear.routing, switchgear.layers and
switchgear.presets offer them."""
