// SPDX-License-Identifier: BSD-3-Clause
// An additional check for tests of the runtime.
#pragma once
#include <string>

#include "check.h"
#include "runtime.h"

// The statement throws, and its message contains the text.
#define CHECK_FAILS(text, ...)                                                            \
  do {                                                                                    \
    std::string message = "nothing was thrown";                                           \
    try {                                                                                 \
      __VA_ARGS__;                                                                        \
    } catch (const std::exception& error) {                                               \
      message = error.what();                                                             \
    }                                                                                     \
    CHECK(message.find(text) != std::string::npos, "expected ", text, ", got ", message); \
  } while (false)
