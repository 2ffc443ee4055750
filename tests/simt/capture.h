// SPDX-License-Identifier: BSD-3-Clause
// Streams that capture. cudaStreamBeginCapture and the other functions of graphs have CUDA's own names; these are for the rest
// of the shim.
#pragma once
#include <cuda_runtime.h>

#include <functional>

namespace simt {

// If the stream captures, moves the work into its graph.
cudaError_t capture(cudaStream_t stream, std::function<void()>& work);
// The default stream must not be used while another one captures.
cudaError_t refuse_capture(cudaStream_t stream);
// For calls that wait or allocate.
cudaError_t refuse_while_capturing();

}  // namespace simt
