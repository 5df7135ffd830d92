// The vocabulary of the public API: dtypes, devices, tensor views, status codes, workspace.
// Plain data only: no type of the C++ standard library crosses the library's boundary.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define FLASH_MLA_API
#else
#define FLASH_MLA_API __attribute__((visibility("default")))
#endif

namespace flash_mla {
inline namespace v0 {

enum class DType : int32_t {
  kUnknown = 0,
  kFloat32 = 1,
  kBFloat16 = 2,
  kFloat16 = 3,
  kFloat8E4M3 = 4,  // OCP e4m3fn: no infinity, NaN is 0x7f and 0xff, largest value 448
  kUInt8 = 5,
  kInt8 = 6,
  kInt32 = 7,
  kInt64 = 8,
  // No operator takes these; they are here so that messages can name them.
  kFloat64 = 9,
  kFloat8E5M2 = 10,
  kInt16 = 11,
  kBool = 12,
};

enum class DeviceType : int32_t { kCpu = 0, kCuda = 1 };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int32_t index = 0;
};

inline constexpr int32_t kMaxRank = 5;

// A borrowed, strided tensor. An optional argument that is absent has rank -1.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kUnknown;
  Device device;
  int32_t rank = -1;
  int64_t shape[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};  // in elements

  constexpr bool defined() const { return rank >= 0; }
};

// A cudaStream_t; ignored for host tensors.
using Stream = void*;

enum class StatusCode : int32_t {
  kOk = 0,
  kInvalidArgument = 1,  // an argument breaks a rule of the contract
  kUnsupported = 2,      // valid, but no kernel in this build serves it on this device
  kRuntimeError = 3,     // the CUDA runtime, or the machine, failed
};

// The outcome of a call. The message names operator, argument, rule, value and remedy.
struct [[nodiscard]] Status {
  StatusCode code = StatusCode::kOk;
  char message[508] = {'\0'};

  constexpr bool ok() const { return code == StatusCode::kOk; }
};

// What an operator needs beside its arguments. The library never allocates device memory.
struct WorkspaceSize {
  int64_t scratch_bytes = 0;  // uninitialised; a function of shapes alone
  int64_t sync_bytes = 0;     // at most 64 KiB
};

// scratch: uninitialised, 256-byte aligned, free for reuse once the call has run in its stream.
// sync: zeroed once by the caller, left zero by each launch, never shared by launches that may
// overlap: one block per device and stream is right.
struct Workspace {
  void* scratch = nullptr;
  int64_t scratch_bytes = 0;
  void* sync = nullptr;
  int64_t sync_bytes = 0;
};

}  // namespace v0
}  // namespace flash_mla
