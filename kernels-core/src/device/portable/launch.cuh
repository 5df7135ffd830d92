// Launching an operator's portable kernel. D: kernel.cuh's.
#pragma once

#include <atomic>

#include "device/decode_launch.cuh"
#include "device/portable/kernel.cuh"
#include "runtime/device_caps.h"
#include "runtime/launch.h"
#include "runtime/variant.h"

namespace flash_mla::portable {

// More CTAs than any device holds at once; the parts of a unit are at most as many.
inline constexpr int64_t kMaxCtas = 1024;

// What the variant needs, whatever its operator: query rows that share their keys, and a device
// with room for the kernel.
template <class D>
const char* refuses(int64_t rows, Device device) {
  using C = typename D::Config;
  constexpr int kSmemBytes = sizeof(typename D::SharedStorage);
  static_assert(kSmemBytes <= kSmemLimitBytes);
  static_assert(merge_smem_bytes(C::kThreads, C::v.tile_m) <=
                kSlabs * C::kTiles * C::kSlabTileBytes);
  static_assert(kMaxCtas * C::kWarps < 1 << 16);  // what a meeting counts
  if (C::kGroups > 1 && rows <= kMmaRows) return "is for more query rows of a key head";
  const DeviceCaps* caps = nullptr;
  if (!device_caps(device, &caps).ok() || caps->smem_per_block_bytes < kSmemBytes) {
    return "needs more shared memory than the device has";
  }
  return nullptr;
}

// CTAs that an SM holds at once, asked once per device.
template <class D>
int ctas_per_sm(Device device) {
  static std::atomic<int> known[64];
  std::atomic<int>* const cached = device.index < 64 ? &known[device.index] : nullptr;
  int ctas = cached == nullptr ? 0 : cached->load(std::memory_order_relaxed);
  if (ctas != 0) return ctas;
  DeviceGuard guard(device);
  constexpr size_t kBytes = sizeof(typename D::SharedStorage);
  const bool asked =
      guard.status().ok() &&
      cudaFuncSetAttribute(decode_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(kBytes)) == cudaSuccess &&
      cudaFuncSetAttribute(decode_kernel<D>, cudaFuncAttributePreferredSharedMemoryCarveout,
                           cudaSharedmemCarveoutMaxShared) == cudaSuccess &&
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, decode_kernel<D>, D::Config::kThreads,
                                                    kBytes) == cudaSuccess;
  if (!asked) (void)cudaGetLastError();  // the launch will say it again
  if (!asked || ctas < 1) ctas = 1;
  if (cached != nullptr) cached->store(ctas, std::memory_order_relaxed);
  return ctas;
}

// CTAs that are resident at once, for an operator's grid.
template <class D>
int64_t resident_ctas(Device device) {
  const DeviceCaps* caps = nullptr;
  const int64_t sms = device_caps(device, &caps).ok() ? caps->num_sms : 1;
  return min_of(kMaxCtas, sms * ctas_per_sm<D>(device));
}

template <class D>
Status launch_decode(const typename D::Params& params, Stream stream) {
  using Op = typename D::Op;
  const LaunchShape shape = {.grid = dim3(static_cast<uint32_t>(params.grid.num_ctas())),
                             .block = dim3(D::Config::kThreads),
                             .smem_bytes = sizeof(typename D::SharedStorage)};
  FLASH_MLA_RETURN_IF_ERROR(launch_list_fixed_parts<Op, /*kProgrammatic=*/false>(params, stream));
  FLASH_MLA_RETURN_IF_ERROR(launch_kernel(decode_kernel<D>, shape, stream, Op::kName, params));
  return launch_merge_fixed_splits<Op, D::Config::kType, PartColumns::kInOrder,
                                   /*kProgrammatic=*/false>(params, stream);
}

}  // namespace flash_mla::portable
