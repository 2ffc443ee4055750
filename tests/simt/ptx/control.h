// SPDX-License-Identifier: BSD-3-Clause
#pragma once
#include "thread.h"

namespace simt::ptx {

// A branch with a guard, the most frequent guarded instruction.
Step guarded_branch(bool negated);

}  // namespace simt::ptx
