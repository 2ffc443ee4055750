# SPDX-License-Identifier: BSD-3-Clause
# Where the CUDA module is built, and for which devices. nvcc 12.5 is the first whose runtime has all functions that it calls.
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

# switchgear_gpu_archs(archs): those of the GPUs that programs see here, such as 80-real or 90a-real; empty if there are none that
# the kernels run on. Asks the driver's program, since a build in isolation has no torch.
function(switchgear_gpu_archs archs)
  set(found)
  if(NOT DEFINED ENV{CUDA_VISIBLE_DEVICES} OR NOT "$ENV{CUDA_VISIBLE_DEVICES}" MATCHES "^(-1)?$")
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                    RESULT_VARIABLE status OUTPUT_VARIABLE text ERROR_QUIET TIMEOUT 60)
    if(status EQUAL 0)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]" capabilities "${text}")
      list(REMOVE_DUPLICATES capabilities)
      foreach(capability IN LISTS capabilities)
        string(REPLACE "." "" arch ${capability})
        if(arch EQUAL 90)  # the kernels of Hopper use instructions that no other architecture has
          list(APPEND found 90a-real)
        elseif(arch GREATER_EQUAL 80)
          list(APPEND found ${arch}-real)
        endif()
      endforeach()
    endif()
  endif()
  list(LENGTH found count)
  if(count GREATER 1)  # all are made from the PTX of the lowest
    list(PREPEND found 80-virtual)
  endif()
  set(${archs} ${found} PARENT_SCOPE)
endfunction()
