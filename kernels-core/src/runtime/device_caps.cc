#include "runtime/device_caps.h"

#include "runtime/status.h"

#if FLASH_MLA_WITH_CUDA
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#endif

namespace flash_mla {

#if FLASH_MLA_WITH_CUDA

namespace {

constexpr int kMaxDevices = 64;

struct CachedCaps {
  std::once_flag once;
  DeviceCaps caps;
  cudaError_t error = cudaSuccess;
};
CachedCaps cached_caps[kMaxDevices];

void query(int index, CachedCaps* cached) {
  // Attributes rather than cudaGetDeviceProperties, which takes milliseconds; both are allowed
  // while a stream of this thread captures a graph.
  auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    if (cached->error == cudaSuccess) cached->error = cudaDeviceGetAttribute(&value, which, index);
    return value;
  };
  cached->caps.compute_capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                                    attribute(cudaDevAttrComputeCapabilityMinor);
  cached->caps.num_sms = attribute(cudaDevAttrMultiProcessorCount);
  cached->caps.smem_per_block_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  // For tests of the kernels of smaller devices: FLASH_MLA_SMEM_LIMIT, in bytes, is what a block
  // can have at most. Read when a process first uses the device.
  if (const char* limit = std::getenv("FLASH_MLA_SMEM_LIMIT"); limit != nullptr && *limit != '\0') {
    cached->caps.smem_per_block_bytes =
        std::min(cached->caps.smem_per_block_bytes, std::atoi(limit));
  }
}

}  // namespace

Status device_caps(Device device, const DeviceCaps** caps) {
  static const DeviceCaps kCpuCaps;
  if (device.type == DeviceType::kCpu) {
    *caps = &kCpuCaps;
    return {};
  }
  if (device.index < 0 || device.index >= kMaxDevices) {
    return make_status(StatusCode::kInvalidArgument, "device index must be in [0, %d), got %d",
                       kMaxDevices, device.index);
  }
  CachedCaps& cached = cached_caps[device.index];
  std::call_once(cached.once, query, device.index, &cached);
  if (cached.error != cudaSuccess) {
    return make_status(StatusCode::kRuntimeError, "cuda:%d cannot be used: %s", device.index,
                       cudaGetErrorString(cached.error));
  }
  *caps = &cached.caps;
  return {};
}

#else

Status device_caps(Device device, const DeviceCaps** caps) {
  static const DeviceCaps kCpuCaps;
  if (device.type != DeviceType::kCpu) {
    return make_status(StatusCode::kUnsupported,
                       "this build has no CUDA kernels (built with FLASH_MLA_CUDA=OFF or without "
                       "nvcc)");
  }
  *caps = &kCpuCaps;
  return {};
}

#endif

}  // namespace flash_mla
