// Launching CUDA kernels: the device of the call, errors as Status, programmatic launches.
#pragma once

#include <cuda_runtime.h>

#include "runtime/status.h"

namespace flash_mla {

inline Status cuda_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return make_status(StatusCode::kRuntimeError, "%s: %s", what, cudaGetErrorString(error));
}

// Makes a device current for a scope, so that calls work for any device of the machine.
class DeviceGuard {
 public:
  explicit DeviceGuard(Device device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device.index) {
      error_ = cudaSetDevice(device.index);
      switched_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (switched_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  Status status() const { return cuda_status(error_, "cudaSetDevice"); }

 private:
  int previous_ = 0;
  bool switched_ = false;
  cudaError_t error_;
};

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t smem_bytes = 0;
  // The kernel begins while its predecessor in the stream drains; it calls griddepcontrol.wait
  // before it touches memory that the predecessor may use.
  bool programmatic = false;
};

// Lets a kernel have more dynamic shared memory than the default. The runtime takes its time even
// where nothing changes, so a thread remembers what it did last. cudaDeviceReset() would undo it
// unseen: who calls that cannot go on using the library.
inline cudaError_t allow_dynamic_smem(const void* kernel, size_t smem_bytes) {
  struct Allowed {
    const void* kernel = nullptr;
    int device = 0;
    size_t smem_bytes = 0;
    bool operator==(const Allowed&) const = default;
  };
  static thread_local Allowed last;
  Allowed wanted = {kernel, 0, smem_bytes};
  cudaError_t error = cudaGetDevice(&wanted.device);
  if (error != cudaSuccess || wanted == last) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(smem_bytes));
  if (error == cudaSuccess) last = wanted;
  return error;
}

template <class... Params, class... Values>
Status launch_kernel(void (*kernel)(Params...), const LaunchShape& shape, Stream stream,
                     const char* name, const Values&... values) {
  constexpr size_t kDefaultLimitBytes = 48 * 1024;
  if (shape.smem_bytes > kDefaultLimitBytes) {
    const cudaError_t error =
        allow_dynamic_smem(reinterpret_cast<const void*>(kernel), shape.smem_bytes);
    if (error != cudaSuccess) return cuda_status(error, name);
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.smem_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = shape.programmatic ? 1 : 0;
  return cuda_status(cudaLaunchKernelEx(&config, kernel, values...), name);
}

}  // namespace flash_mla
