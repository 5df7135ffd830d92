#include "flash_mla/cuda_stream.h"

#include "runtime/status.h"

#if FLASH_MLA_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace flash_mla {
inline namespace v0 {

#if FLASH_MLA_WITH_CUDA

Status stream_capture_id(Stream stream, uint64_t* id) {
  *id = 0;
  // The legacy default stream cannot be captured, and asking about it is an error while a stream
  // that synchronises with it captures.
  if (stream == nullptr || stream == cudaStreamLegacy) return {};
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  const cudaError_t error =
      cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &capture);
  if (error != cudaSuccess) {
    return make_status(StatusCode::kRuntimeError, "cudaStreamGetCaptureInfo: %s",
                       cudaGetErrorString(error));
  }
  if (status != cudaStreamCaptureStatusNone) *id = capture;
  return {};
}

#else

Status stream_capture_id(Stream, uint64_t* id) {
  *id = 0;
  return make_status(StatusCode::kUnsupported,
                     "stream_capture_id: this build has no CUDA (built with FLASH_MLA_CUDA=OFF or "
                     "without nvcc)");
}

#endif

}  // namespace v0
}  // namespace flash_mla
