// Device code of kv_cache_append and kv_cache_gather, the same on every architecture, and its
// launch. The rows of the variant table differ in how the kernel is launched.
//
//   cache[slot[t]] = quantise(kv[t])        kv[t] = dequantise(cache[slot[t]])
//
// A warp takes up to kMaxRowsPerWarp consecutive rows (a token and a head each), one after the
// other, and loads one ahead. First each lane finds the place of one row, so that the division by
// the page size is done once for all of them; then the lanes share each row (row.cuh). kv is read
// and written 16 bytes a lane, the cache 2 to 16, all of it coalesced; a tile's amax is a butterfly
// of shuffles over the 1 to 32 lanes that have its columns. No shared memory, no barrier.
//
// Bottleneck: device memory (README.md has the numbers). On an H200 that moves 3.4 TB/s a row of
// 1312 bytes (v41_fp4 and bf16) leaves an SM 90 cycles, of whose 360 issue slots about 220 are
// used.
#pragma once

#include <cstdint>

#include "device/sm90/programmatic_launch.cuh"
#include "kv_cache/row.cuh"
#include "runtime/device_caps.h"
#include "runtime/launch.h"

namespace flash_mla::kv_cache {

inline constexpr int kWarpsPerBlock = 4;
inline constexpr int kMaxRowsPerWarp = 16;

struct GpuParams {
  Params problem;
  int64_t num_rows;
  int32_t rows_per_warp;
};

// The address that lane `lane` has.
__device__ __forceinline__ uint8_t* of_lane(uint8_t* address, int lane) {
  const auto bits = reinterpret_cast<unsigned long long>(address);
  auto* result = reinterpret_cast<uint8_t*>(__shfl_sync(kAllLanes, bits, lane));
  // Else every access through it would look up first which memory it is.
  __builtin_assume(__isGlobal(result));
  return result;
}

// Move: Append or Gather. kProgrammatic: starts while the kernel that writes its input drains, and
// lets the next one start (sm_90 and later).
template <class Move, bool kProgrammatic>
__global__ void __launch_bounds__(kWarpsPerBlock* kLanes)
    move_kernel(const __grid_constant__ GpuParams params) {
  using S = typename Move::S;
  if constexpr (kProgrammatic) {
    flash_mla::sm90::wait_for_predecessor();
    flash_mla::sm90::launch_successor();
  }
  const Params& p = params.problem;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t warp = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kLanes;
  const int64_t first = warp * params.rows_per_warp;
  const int64_t rest = params.num_rows - first;
  const int count = static_cast<int>(rest < params.rows_per_warp ? rest : params.rows_per_warp);
  if (count <= 0) return;

  RowAddress own = {};  // of row first + lane
  int64_t slot = -1;
  int64_t head = 0;
  if (lane < count) {
    int64_t token = first + lane;
    if (!S::kPacked && p.cache.h_kv > 1) {  // packed formats have one head
      head = token % p.cache.h_kv;
      token /= p.cache.h_kv;
    }
    own.kv = static_cast<uint8_t*>(p.kv) +
             (token * p.kv_stride_t + head * p.kv_stride_h) * S::kElementBytes;
    slot = p.slot(token);
  }
  const auto row_address = [&own](int row) {
    return RowAddress{of_lane(own.kv, row), of_lane(own.token, row),
                      S::kPageScales ? of_lane(own.scales, row) : nullptr};
  };
  const Move move(p, lane);
  typename Move::Row next;
  if constexpr (!Move::kLoadNeedsSlot) next = move.load(row_address(0));
  if (p.cache.has_slot(slot)) {
    constexpr KvLayout kLayout = S::kLayout;
    const int64_t page = slot / p.cache.page_size;
    const int64_t offset = slot - page * p.cache.page_size;
    // The cache is append's output: PagedKv points to it as const for the attention kernels.
    own.token =
        const_cast<uint8_t*>(p.cache.row(kLayout, page, offset, static_cast<int32_t>(head)));
    own.scales = const_cast<uint8_t*>(p.cache.scales(kLayout, page, offset));
  }
  if constexpr (Move::kLoadNeedsSlot) next = move.load(row_address(0));

#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const RowAddress at = row_address(i);
    const typename Move::Row row = next;
    if (i + 1 < count) next = move.load(row_address(i + 1));
    move.store(at, row);
  }
}

template <class Cfg>
const char* supports(const Problem& p) {
  return p.cache.format == Cfg::v.kv ? nullptr : "serves another cache format";
}

template <class Cfg>
WorkspaceSize workspace(const Problem&) {
  return {};
}

// One row a warp until the device is full several times over: few rows are a matter of latency.
inline int32_t rows_per_warp(int64_t num_rows, Device device) {
  constexpr int64_t kWarpsPerSm = 4 * 64;  // four times what an SM holds
  const DeviceCaps* caps = nullptr;
  const int64_t sms = device_caps(device, &caps).ok() ? caps->num_sms : 1;
  const int64_t rows = num_rows / (sms * kWarpsPerSm);
  return static_cast<int32_t>(rows < 1 ? 1 : rows > kMaxRowsPerWarp ? kMaxRowsPerWarp : rows);
}

template <class Cfg, DType kType, bool kProgrammatic>
Status launch_of_dtype(const GpuParams& params, const LaunchShape& shape, Stream stream) {
  return params.problem.direction == Direction::kAppend
             ? launch_kernel(move_kernel<Append<Cfg, kType>, kProgrammatic>, shape, stream,
                             "kv_cache_append", params)
             : launch_kernel(move_kernel<Gather<Cfg, kType>, kProgrammatic>, shape, stream,
                             "kv_cache_gather", params);
}

template <class Cfg, bool kProgrammatic>
Status launch_move(const Problem& p, Stream stream) {
  DeviceGuard guard(p.device);
  FLASH_MLA_RETURN_IF_ERROR(guard.status());
  const int64_t num_rows = p.num_tokens * p.cache.h_kv;
  const GpuParams params = {p, num_rows, rows_per_warp(num_rows, p.device)};
  const int64_t rows_per_block = int64_t{kWarpsPerBlock} * params.rows_per_warp;
  const LaunchShape shape = {
      .grid = dim3(static_cast<uint32_t>((num_rows + rows_per_block - 1) / rows_per_block)),
      .block = dim3(kWarpsPerBlock * kLanes),
      .programmatic = kProgrammatic};
  switch (p.kv_dtype) {
    case DType::kBFloat16:
      return launch_of_dtype<Cfg, DType::kBFloat16, kProgrammatic>(params, shape, stream);
    case DType::kFloat16:
      return launch_of_dtype<Cfg, DType::kFloat16, kProgrammatic>(params, shape, stream);
    default: return launch_of_dtype<Cfg, DType::kFloat32, kProgrammatic>(params, shape, stream);
  }
}

}  // namespace flash_mla::kv_cache
