# SPDX-License-Identifier: BSD-3-Clause
# Stops before the first compilers that have the parts of C++20 and the instructions of the kernels (docs/platforms.md).
# CMake itself takes older ones, which fail in the middle of the build. Compilers by other names, or without a version, are
# left to try.
set(switchgear_first_GNU 11)
set(switchgear_first_Clang 14)

set(first switchgear_first_${CMAKE_CXX_COMPILER_ID})
if(DEFINED ${first} AND CMAKE_CXX_COMPILER_VERSION AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS ${first})
  message(FATAL_ERROR "switchgear needs GCC ${switchgear_first_GNU} or Clang ${switchgear_first_Clang}, or newer, got "
                      "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} (${CMAKE_CXX_COMPILER}). "
                      "Environment CXX=… chooses another compiler")
endif()
