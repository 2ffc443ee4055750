# SPDX-License-Identifier: BSD-3-Clause
# simt_kernels from nvcc's objects: their host code is nvcc's, and their kernels are PTX that simt_ptx executes. Objects are
# cached by the compiler launcher (ccache), if there is one. Programs print how many instructions threads have executed if
# SWITCHGEAR_PTX_STATISTICS is set.
find_program(SWITCHGEAR_NVCC nvcc REQUIRED)

add_library(simt_ptx STATIC
  ptx/address.cpp
  ptx/arithmetic.cpp
  ptx/atomic.cpp
  ptx/cluster.cpp
  ptx/comparison.cpp
  ptx/control.cpp
  ptx/conversion.cpp
  ptx/copy.cpp
  ptx/coverage.cpp
  ptx/cudart.cpp
  ptx/decode.cpp
  ptx/execute.cpp
  ptx/flow.cpp
  ptx/half_arithmetic.cpp
  ptx/hopper.cpp
  ptx/lanes.cpp
  ptx/load_store.cpp
  ptx/logic.cpp
  ptx/matrix.cpp
  ptx/module.cpp
  ptx/move.cpp
  ptx/parse.cpp
  ptx/registers.cpp
  ptx/undefined.cpp)
target_include_directories(simt_ptx PRIVATE ptx)
target_compile_options(simt_ptx PRIVATE ${simt_warnings} -O2 -ffp-contract=off -frounding-math -fno-math-errno)
target_link_libraries(simt_ptx PUBLIC simt_runtime)

# switchgear_nvcc_object(source name architecture result flag…): the object's path in `result`.
function(switchgear_nvcc_object source name architecture result)
  set(object ${CMAKE_CURRENT_BINARY_DIR}/nvcc/${name}.o)
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${CMAKE_CXX_COMPILER_LAUNCHER} ${SWITCHGEAR_NVCC} -std=c++20 -O3 -DNDEBUG -lineinfo --no-compress -Xcompiler=-fPIC
            -gencode=arch=compute_${architecture},code=compute_${architecture} -I${PROJECT_SOURCE_DIR}/include
            -I${PROJECT_SOURCE_DIR}/csrc ${ARGN} -MD -MF ${object}.d -MT ${object} -c -o ${object} ${source}
    DEPENDS ${source} DEPFILE ${object}.d COMMENT "nvcc ${name} for compute_${architecture}" VERBATIM)
  set(${result} ${object} PARENT_SCOPE)
endfunction()

file(MAKE_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/nvcc)
set(nvcc_objects "")
foreach(source IN LISTS kernel_sources)
  get_filename_component(name ${source} NAME_WE)
  set(architecture 80)
  if(source IN_LIST switchgear_cuda_sm90_sources)
    set(architecture 90a)
  endif()
  switchgear_nvcc_object(${source} ${name} ${architecture} object)
  list(APPEND nvcc_objects ${object})
endforeach()
add_library(simt_kernels STATIC ${nvcc_objects})
set_target_properties(simt_kernels PROPERTIES LINKER_LANGUAGE CXX)
target_link_libraries(simt_kernels PUBLIC simt_ptx)
