// SPDX-License-Identifier: BSD-3-Clause
// Runs a kernel's PTX: the body of every fiber.
#pragma once
#include <functional>

#include "decode.h"

namespace simt::ptx {

// What every thread of the launch calls. arguments[i] points to the bytes of parameter i, which are copied.
std::function<void()> bind(const Code& code, void* const* arguments);

// Instructions executed by all threads so far.
uint64_t& executed_instructions();

}  // namespace simt::ptx
