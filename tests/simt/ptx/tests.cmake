# SPDX-License-Identifier: BSD-3-Clause
# The tests of ../CMakeLists.txt on the kernels' PTX.
foreach(test IN ITEMS route policies plan permute combine glu gate grouped_gemm stored stored_sm90 gemm_sm90 low_rank moe launchers)
  switchgear_simt_test(${test} test_${test}.cpp)
  target_link_libraries(simt_test_${test} PRIVATE simt_kernels switchgear_core)
endforeach()

switchgear_nvcc_object(${CMAKE_CURRENT_LIST_DIR}/exchange_kernels.cu exchange_kernels 80 object
  -I${PROJECT_SOURCE_DIR}/csrc/cuda)
switchgear_simt_test(exchange test_exchange.cpp ${object})
target_link_libraries(simt_test_exchange PRIVATE simt_kernels switchgear_core)

find_program(python NAMES python3 python)
# Every wrapper of PTX on random data: the PTX writes the same bits as the C++ model (tools/gpu/conformance.cu).
foreach(architecture IN ITEMS 80 90a)
  set(hopper "")
  if(architecture STREQUAL "90a")
    set(hopper -DHOPPER)
  endif()
  switchgear_nvcc_object(${PROJECT_SOURCE_DIR}/tools/gpu/conformance.cu conformance_${architecture} ${architecture} object
    -I${PROJECT_SOURCE_DIR}/csrc/cuda -I${CMAKE_CURRENT_SOURCE_DIR} -DINTERPRETED ${hopper})
  add_executable(ptx_conformance_${architecture} ${object})
  set_target_properties(ptx_conformance_${architecture} PROPERTIES LINKER_LANGUAGE CXX)
  target_link_libraries(ptx_conformance_${architecture} PRIVATE simt_kernels simt_ptx simt)
  foreach(order IN LISTS simt_orders)
    string(REPLACE ":" "_" suffix ${order})
    add_test(NAME ptx_conformance_${architecture}_${suffix} COMMAND
             ${python} ${CMAKE_CURRENT_LIST_DIR}/same_lines.py $<TARGET_FILE:ptx_conformance_${architecture}>
             $<TARGET_FILE:simt_conformance>)
    set_tests_properties(ptx_conformance_${architecture}_${suffix} PROPERTIES
                         TIMEOUT 120 LABELS simt ENVIRONMENT SWITCHGEAR_SIMT_ORDER=${order})
  endforeach()
endforeach()

switchgear_simt_test(instructions ptx/test_instructions.cpp)
target_include_directories(simt_test_instructions PRIVATE ptx)
target_link_libraries(simt_test_instructions PRIVATE simt_ptx)
