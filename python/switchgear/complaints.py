# SPDX-License-Identifier: BSD-3-Clause
"""The old name of switchgear.checks and switchgear.utils.packages, while modules move to them."""

from switchgear.checks import (
    as_device,
    at_least,
    check_dense,
    check_float_dtype,
    check_function,
    check_module,
    check_optimizer,
    check_seconds,
    check_seed,
    check_several,
    check_switch,
    check_tensor,
    complain_about_rows,
    integer,
    list_of_names,
    sizes,
)
from switchgear.checks import explain_failure as complain
from switchgear.utils.packages import failed_import, first_line, installed_version, is_installed, missing_package

__all__ = [
    "as_device",
    "at_least",
    "check_dense",
    "check_float_dtype",
    "check_function",
    "check_module",
    "check_optimizer",
    "check_seconds",
    "check_seed",
    "check_several",
    "check_switch",
    "check_tensor",
    "complain",
    "complain_about_rows",
    "failed_import",
    "first_line",
    "installed_version",
    "integer",
    "is_installed",
    "list_of_names",
    "missing_package",
    "sizes",
]
