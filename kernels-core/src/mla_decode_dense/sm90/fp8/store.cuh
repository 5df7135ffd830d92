// The end of a pass in a consumer warpgroup: normalise, and store the result or the partial result.
#pragma once

#include "mla_decode_dense/sm90/fp8/attend.cuh"

namespace flash_mla::mla_decode_dense::sm90::fp8 {

inline constexpr int kPartWriters = kConsumers * kWarpgroupWarps;  // each has columns of all rows

template <class Cfg>
__device__ __forceinline__ void store(const GpuParams& p, SharedStorage<Cfg>& smem,
                                      Attend<Cfg>& attend, int32_t member, uint32_t index, int wg) {
  constexpr int kN = Config<Cfg>::kRows;
  constexpr int kRowsOfLane = (kN + kLanes - 1) / kLanes;
  const Place at;
  // A row's sum is that of all warps.
  float (&row_sum)[kN] = smem.row_sum[wg * kWarpgroupWarps + at.warp];
#pragma unroll
  for (int i = 0; i < Attend<Cfg>::kSums; ++i) row_sum[attend.sum_row(at, i)] = attend.sum[i];
  flash_mla::sm90::named_barrier_sync(kItemDone, kConsumerThreads);

  const ItemSlot& slot = smem.feed.slots[index % 2];
  const WorkItem item = slot.item;
  const TileRows rows(p, item, member, slot.length);
  const bool whole = item.num_parts == 1;
  const float factor = whole ? descale(p.descale_k, p.descale_k_stride, item.request) : 1.0f;
  const int64_t tile = whole ? 0 : partial_tile(p.grid, item, member, item.part);
  // Rows `lane` and `lane` + 32.
  float scale[kRowsOfLane];
  uint8_t* to[kRowsOfLane];
#pragma unroll
  for (int r = 0; r < kRowsOfLane; ++r) {
    const int32_t row = at.lane + r * kLanes;
    scale[r] = 0.0f;
    to[r] = nullptr;
    if (row >= kN || !rows.valid(p, row) ||
        !(slot.only_token < 0 || rows.token(p, row) == slot.only_token)) {
      continue;
    }
    SoftmaxRow softmax = {smem.rows[row].max, 0.0f};
#pragma unroll
    for (int w = 0; w < kConsumers * kWarpgroupWarps; ++w) softmax.sum += smem.row_sum[w][row];
    scale[r] = !whole ? 1.0f : softmax.empty() ? 0.0f : factor / softmax.sum;
    to[r] = whole ? rows.out(p, row) : p.partials.row(tile, row);
    if (threadIdx.x >= kLanes) continue;
    if (whole) {
      *rows.lse(p, row) = softmax.lse();
    } else {
      *p.partials.header(tile, row) = {softmax.max_log2, softmax.sum, 0.0f, 0.0f};
    }
  }
  const int32_t column = 256 * wg + 64 * at.warp + at.g * 8;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = 8 * j + 2 * at.t + e;
      const float s = __shfl_sync(kAllLanes, scale[8 * j / kLanes], row % kLanes);
      uint8_t* const out = reinterpret_cast<uint8_t*>(
          __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(to[8 * j / kLanes]), row % kLanes));
      if (out == nullptr) continue;
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] =
            pack_out<DType::kBFloat16>(attend.o[i][4 * j + e] * s, attend.o[i][4 * j + 2 + e] * s);
      }
      *reinterpret_cast<uint4*>(out + 2 * column) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
  __syncwarp();
  if (at.lane == 0) flash_mla::sm90::arrive(smem.feed.q_empty);
  __syncwarp();
  if (whole || p.grid.invariant_splits > 0 || !slot.last) return;
  // Tells the others of the unit; they meet after their last items.
  split_unit(p, item, member, kPartWriters).arrive();
  if (threadIdx.x == 0) smem.split_items[smem.num_split++] = item;
}

}  // namespace flash_mla::mla_decode_dense::sm90::fp8
