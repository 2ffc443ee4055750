# SPDX-License-Identifier: BSD-3-Clause
# The first compilers that have the parts of C++20 and the instructions of the kernels (docs/platforms.md). CMake itself
# takes older ones, which fail in the middle of the build.
set(switchgear_first_GNU 11)
set(switchgear_first_Clang 14)

# switchgear_check_compiler(id version): stops with what is needed. Others than these two are left to try.
function(switchgear_check_compiler id version)
  if(DEFINED switchgear_first_${id} AND version VERSION_LESS switchgear_first_${id})
    message(FATAL_ERROR "switchgear needs GCC ${switchgear_first_GNU} or Clang ${switchgear_first_Clang}, or newer, got ${id} "
                        "${version} (${CMAKE_CXX_COMPILER}). Environment CXX=… chooses another compiler")
  endif()
endfunction()
