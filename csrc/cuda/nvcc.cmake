# SPDX-License-Identifier: BSD-3-Clause
# Which nvcc builds the CUDA module: 12.5 is the first whose runtime has all functions that it calls.
set(switchgear_first_nvcc 12.5)

# switchgear_nvcc_version(compiler version): of `compiler`, such as 12.8; empty if it is not nvcc.
function(switchgear_nvcc_version compiler version)
  execute_process(COMMAND ${compiler} --version OUTPUT_VARIABLE text ERROR_QUIET)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" found "${text}")
  set(${version} "${CMAKE_MATCH_1}" PARENT_SCOPE)
endfunction()

# switchgear_cuda_archs(version archs): those that a module has by default; 12.8 is the first that knows sm_100 and sm_120.
function(switchgear_cuda_archs version archs)
  set(all 80 90a-real)
  if(version VERSION_GREATER_EQUAL 12.8)
    list(APPEND all 100-real 120-real)
  endif()
  set(${archs} ${all} PARENT_SCOPE)
endfunction()
