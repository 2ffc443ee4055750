# SPDX-License-Identifier: BSD-3-Clause
"""Who goes where: the router, and the losses that keep experts equally busy."""

from switchgear.routing.balance import load_balancing_loss, z_loss
from switchgear.routing.router import Router

__all__ = ["Router", "load_balancing_loss", "z_loss"]
