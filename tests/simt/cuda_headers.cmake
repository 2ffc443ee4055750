# SPDX-License-Identifier: BSD-3-Clause
# switchgear_find_cuda_headers(variable): the directories with cuda_runtime.h, cuda.h, cuda_bf16.h and what they include.
# Searched in order: SWITCHGEAR_CUDA_INCLUDE, nvcc's toolkit, the usual places, Python's wheels.

# A list: in some versions the wheels have a separate directory for crt/.
set(SWITCHGEAR_CUDA_INCLUDE "" CACHE STRING "Include directories of CUDA, where they are not found by themselves")

function(switchgear_find_cuda_headers variable)
  set(candidates ${SWITCHGEAR_CUDA_INCLUDE})
  find_program(nvcc nvcc)
  if(nvcc)
    # The nvcc on PATH may be a link or a wrapper, so ask nvcc itself for its toolkit.
    file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/empty.cu "")
    execute_process(COMMAND ${nvcc} --dryrun ${CMAKE_CURRENT_BINARY_DIR}/empty.cu OUTPUT_VARIABLE text ERROR_VARIABLE text)
    if(text MATCHES "TOP=([^\n]*)\n")
      file(REAL_PATH "${CMAKE_MATCH_1}" toolkit)
      list(APPEND candidates ${toolkit}/include ${toolkit}/targets/x86_64-linux/include)
    endif()
  endif()
  list(APPEND candidates /usr/local/cuda/include /opt/cuda/include)
  find_program(python NAMES python3 python)
  if(python)
    execute_process(COMMAND ${python} -c "import nvidia, glob\nfor p in nvidia.__path__:\n print('\\n'.join(glob.glob(p + '/*/include')))"
                    OUTPUT_VARIABLE text ERROR_QUIET)
    string(REGEX MATCHALL "[^\n]+" wheels "${text}")
    list(APPEND candidates ${wheels})
  endif()
  set(found "")
  foreach(header cuda_runtime.h cuda.h cuda_bf16.h crt/host_config.h)
    set(here "")
    foreach(candidate IN LISTS candidates)
      if(NOT here AND EXISTS ${candidate}/${header})
        set(here ${candidate})
      endif()
    endforeach()
    if(NOT here)
      message(FATAL_ERROR "tests/simt needs the headers of CUDA 12.4 or later, and found no ${header}. Install a toolkit, or\n"
                          "  pip install nvidia-cuda-runtime nvidia-cuda-crt\n"
                          "or give their directories: -DSWITCHGEAR_CUDA_INCLUDE=<directory>[;<directory>]")
    endif()
    list(APPEND found ${here})
  endforeach()
  list(REMOVE_DUPLICATES found)
  message(STATUS "tests/simt: headers of CUDA in ${found}")
  set(${variable} ${found} PARENT_SCOPE)
endfunction()
