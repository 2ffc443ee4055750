# SPDX-License-Identifier: BSD-3-Clause
# The kernels and their table: compiled by nvcc here, by the C++ compiler in tests/simt. Code that needs sm_90a has its
# own list, since nvcc compiles it for no other architecture.
set(switchgear_cuda_sources adapter assign_balanced assign_capped backend column_topk combine exchange expert_weights fit_capacity gate gemm generation glu grouped_gemm moe_backward moe_forward permute plan quantize_rows route route_dynamic stored tensor_map)
set(switchgear_cuda_sm90_sources gemm_sm90 stored_sm90)
list(TRANSFORM switchgear_cuda_sources REPLACE "(.+)" "${CMAKE_CURRENT_LIST_DIR}/\\1.cu")
list(TRANSFORM switchgear_cuda_sm90_sources REPLACE "(.+)" "${CMAKE_CURRENT_LIST_DIR}/\\1.cu")

# Large templates are compiled in parallel, each instance from a file that is written into the build folder.
# switchgear_cuda_unit(sources name header instances): writes one, and adds its path to the list `sources`.
set(switchgear_cuda_folder ${CMAKE_CURRENT_LIST_DIR})
function(switchgear_cuda_unit sources name header instances)
  set(unit ${PROJECT_BINARY_DIR}/csrc/cuda/${name}.cu)
  configure_file(${switchgear_cuda_folder}/unit.cu.in ${unit} @ONLY)
  set(${sources} ${${sources}} ${unit} PARENT_SCOPE)
endfunction()

set(gemm_dtypes bf16 f16 tf32 f32)
set(gemm_products MmaProduct<__nv_bfloat16> MmaProduct<__half> MmaProduct<float> FmaProduct)
foreach(dtype product IN ZIP_LISTS gemm_dtypes gemm_products)
  switchgear_cuda_unit(switchgear_cuda_sources gemm_${dtype} gemm_launch.cuh
    "void gemm_${dtype}(const Gemm& g, void* stream) { launch_gemm<${product}>(g, stream); }
void wgrad_${dtype}(const Wgrad& g, void* stream) { launch_wgrad<${product}>(g, stream); }")
  switchgear_cuda_unit(switchgear_cuda_sources decoded_gemm_${dtype} decoded_gemm.cuh
    "void decoded_gemm_${dtype}(const Gemm& g, const StoredOperand& w, bool transposed, void* stream) {
  launch_decoded_gemm<${product}>(g, w, transposed, stream);
}")
endforeach()

# The formats are the rows of the table in weight.h that CUDA's kernels read.
set(switchgear_formats ${CMAKE_CURRENT_LIST_DIR}/../../include/switchgear/weight.h)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${switchgear_formats})
file(STRINGS ${switchgear_formats} rows REGEX "^    {\"[a-z0-9]+\", .*Readers::k(Cuda|Hopper)}")
foreach(row IN LISTS rows)
  string(REGEX MATCH "\"(.)([a-z0-9]+)\"" format "${row}")
  set(format ${CMAKE_MATCH_1}${CMAKE_MATCH_2})
  string(TOUPPER ${CMAKE_MATCH_1} first)
  set(instance "<Format::k${first}${CMAKE_MATCH_2}>(const Gemm& g, const StoredOperand& w, void* stream);")
  switchgear_cuda_unit(switchgear_cuda_sources stored_gemm_${format} stored_gemm.cuh "template void stored_gemm_of${instance}")
  if(row MATCHES "kHopper")
    switchgear_cuda_unit(switchgear_cuda_sm90_sources stored_sm90_${format} stored_sm90.cuh "template void stored_sm90_of${instance}")
  endif()
endforeach()
