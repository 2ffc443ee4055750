// SPDX-License-Identifier: BSD-3-Clause
// The text of a kernel to statements.
#pragma once
#include "program.h"
#include "scan.h"

namespace simt::ptx {

// Behind the state space: `.align 4 .b8 name[16]`.
Variable parse_variable(Scanner& scan);

using Files = std::map<int, std::string>;
using Globals = std::map<std::string, uint64_t, std::less<>>;
// `scan` stands behind the kernel's name.
std::unique_ptr<Kernel> parse_kernel(const std::string& symbol, Scanner scan, const Files& files,
                                     const std::vector<Variable>& module_shared, const Globals& globals);

}  // namespace simt::ptx
