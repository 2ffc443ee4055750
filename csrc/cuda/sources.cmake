# SPDX-License-Identifier: BSD-3-Clause
# The kernels and their table: compiled by nvcc here, by the C++ compiler in tests/simt. Code that needs sm_90a has its
# own list, since nvcc compiles it for no other architecture.
set(switchgear_cuda_sources adapter assign_balanced assign_capped backend column_topk combine decoded_gemm_bf16 decoded_gemm_f16 decoded_gemm_f32 decoded_gemm_tf32 exchange expert_weights fit_capacity gate gemm gemm_bf16 gemm_f16 gemm_f32 gemm_tf32 generation glu grouped_gemm moe_backward moe_forward permute plan quantize_rows route route_dynamic stored stored_gemm_fp8 stored_gemm_groups stored_gemm_int4 stored_gemm_int8 stored_gemm_mxfp4 stored_gemm_nf4 tensor_map)
set(switchgear_cuda_sm90_sources gemm_sm90 stored_sm90 stored_sm90_fp8 stored_sm90_groups stored_sm90_int4 stored_sm90_int8 stored_sm90_mxfp4 stored_sm90_nf4)
list(TRANSFORM switchgear_cuda_sources REPLACE "(.+)" "${CMAKE_CURRENT_LIST_DIR}/\\1.cu")
list(TRANSFORM switchgear_cuda_sm90_sources REPLACE "(.+)" "${CMAKE_CURRENT_LIST_DIR}/\\1.cu")
