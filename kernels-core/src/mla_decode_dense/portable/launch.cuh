// mla_decode_dense, row portable: what its variants serve, and their launch.
#pragma once

#include <atomic>

#include "mla_decode_dense/gpu.cuh"
#include "mla_decode_dense/portable/kernel.cuh"
#include "runtime/device_caps.h"
#include "runtime/launch.h"
#include "runtime/variant.h"

namespace flash_mla::mla_decode_dense::portable {

inline constexpr Row kRow = Row::kPortable;

// More CTAs than any device holds at once; the parts of a unit are at most as many.
inline constexpr int64_t kMaxCtas = 1024;

template <class Cfg>
const char* supports(const Problem& p) {
  using C = Config<Cfg>;
  static_assert(sizeof(SharedStorage<Cfg>) <= kSmemLimitBytes);
  static_assert(merge_smem_bytes(C::kThreads, C::v.tile_m) <=
                kSlabs * C::kStages * C::kSlabTileBytes);
  static_assert(kMaxCtas * C::kWarps < 1 << 16);  // what a meeting counts
  if (p.kv.format != C::v.kv) return "serves another cache format";
  if (p.q_dtype != C::v.q) return "serves another dtype of q";
  if (p.d_qk != C::v.d_qk) return "serves another d_qk";
  if (C::kGroups > 1 && p.s_q * (p.h_q / p.kv.h_kv) <= kMmaRows) {
    return "is for more query rows of a key head";
  }
  const DeviceCaps* caps = nullptr;
  if (!device_caps(p.device, &caps).ok() ||
      caps->smem_per_block_bytes < static_cast<int>(sizeof(SharedStorage<Cfg>))) {
    return "needs more shared memory than the device has";
  }
  return nullptr;
}

// CTAs that an SM holds at once, asked once per device.
template <class Cfg>
int ctas_per_sm(Device device) {
  static std::atomic<int> known[64];
  std::atomic<int>* const cached = device.index < 64 ? &known[device.index] : nullptr;
  int ctas = cached == nullptr ? 0 : cached->load(std::memory_order_relaxed);
  if (ctas != 0) return ctas;
  DeviceGuard guard(device);
  constexpr size_t kBytes = sizeof(SharedStorage<Cfg>);
  const bool asked =
      guard.status().ok() &&
      cudaFuncSetAttribute(decode_kernel<Cfg>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(kBytes)) == cudaSuccess &&
      cudaFuncSetAttribute(decode_kernel<Cfg>, cudaFuncAttributePreferredSharedMemoryCarveout,
                           cudaSharedmemCarveoutMaxShared) == cudaSuccess &&
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, decode_kernel<Cfg>,
                                                    Config<Cfg>::kThreads, kBytes) == cudaSuccess;
  if (!asked) (void)cudaGetLastError();  // the launch will say it again
  if (!asked || ctas < 1) ctas = 1;
  if (cached != nullptr) cached->store(ctas, std::memory_order_relaxed);
  return ctas;
}

// The same for workspace() and launch().
template <class Cfg>
DecodeGrid grid(const Problem& p) {
  const DeviceCaps* caps = nullptr;
  const int64_t sms = device_caps(p.device, &caps).ok() ? caps->num_sms : 1;
  return decode_grid(p.b, p.s_q, p.h_q / p.kv.h_kv, p.kv.h_kv, Cfg::v.tile_m, /*max_team=*/1,
                     min_of(kMaxCtas, sms * ctas_per_sm<Cfg>(p.device)), max_blocks(p),
                     p.batch_invariant);
}

template <class Cfg>
WorkspaceSize workspace(const Problem& p) {
  return gpu_workspace(grid<Cfg>(p));
}

template <class Cfg>
Status launch(const Problem& p, const Workspace& workspace, Stream stream) {
  DeviceGuard guard(p.device);
  FLASH_MLA_RETURN_IF_ERROR(guard.status());
  const GpuParams params = gpu_params(p, grid<Cfg>(p), workspace);
  const LaunchShape shape = {.grid = dim3(static_cast<uint32_t>(params.grid.num_ctas())),
                             .block = dim3(Config<Cfg>::kThreads),
                             .smem_bytes = sizeof(SharedStorage<Cfg>)};
  FLASH_MLA_RETURN_IF_ERROR(launch_list_fixed_parts</*kProgrammatic=*/false>(params, stream));
  FLASH_MLA_RETURN_IF_ERROR(launch_kernel(decode_kernel<Cfg>, shape, stream, kOperator, params));
  return launch_merge_fixed_splits<Config<Cfg>::kType, PartColumns::kInOrder,
                                   /*kProgrammatic=*/false>(params, stream);
}

}  // namespace flash_mla::mla_decode_dense::portable
