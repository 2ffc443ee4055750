// SPDX-License-Identifier: BSD-3-Clause
// CUDA graphs as far as launchers meet them: one stream captures at a time, and a graph is the list of its work with the
// arguments of that time. What a device refuses during a capture is refused here: waits, allocations (cudaMalloc and the like
// always), and the default stream.
#include "capture.h"

#include <vector>

struct CUgraph_st {
  std::vector<std::function<void()>> work;
};
struct CUgraphExec_st {
  std::vector<std::function<void()>> work;
};

namespace simt {
namespace {

bool capturing = false;
cudaStream_t captured_stream = nullptr;
CUgraph_st* graph_in_progress = nullptr;

}  // namespace

cudaError_t capture(cudaStream_t stream, std::function<void()>& work) {
  if (const cudaError_t error = refuse_capture(stream); error != cudaSuccess) return error;
  if (!capturing || stream != captured_stream) return cudaSuccess;
  graph_in_progress->work.push_back(std::move(work));
  work = nullptr;
  return cudaSuccess;
}

cudaError_t refuse_capture(cudaStream_t stream) {
  return capturing && stream == nullptr ? cudaErrorStreamCaptureImplicit : cudaSuccess;
}

cudaError_t refuse_while_capturing() { return capturing ? cudaErrorStreamCaptureUnsupported : cudaSuccess; }

}  // namespace simt

using namespace simt;

extern "C" {

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (capturing || stream == nullptr) return cudaErrorStreamCaptureUnsupported;
  capturing = true;
  captured_stream = stream;
  graph_in_progress = new CUgraph_st;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (!capturing || stream != captured_stream) return cudaErrorIllegalState;
  capturing = false;
  *graph = graph_in_progress;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = capturing && stream == captured_stream ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  for (const std::function<void()>& work : exec->work) work();
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void**, size_t) { return cudaErrorNotSupported; }
cudaError_t cudaMallocAsync(void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaFree(void*) { return cudaErrorNotSupported; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return refuse_while_capturing(); }

}  // extern "C"
