// The end of a pass in a consumer warpgroup: normalise, and store the result or the partial result.
#pragma once

#include "mla_decode_dense/sm90/transposed/attend.cuh"

namespace flash_mla::mla_decode_dense::sm90::transposed {

inline constexpr int kPartWriters = kConsumers * kWarpgroupWarps;  // each has columns of all rows

template <class Cfg>
__device__ __forceinline__ void store(const GpuParams& p, SharedStorage<Cfg>& smem,
                                      Attend<Cfg>& attend, int32_t member, uint32_t index, int wg) {
  using C = Config<Cfg>;
  constexpr int kN = C::kRows;
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
    SoftmaxRow softmax = {smem.rows[0][row].max, 0.0f};
    if constexpr (!C::kShared) softmax.max_log2 = fmaxf(softmax.max_log2, smem.rows[1][row].max);
#pragma unroll
    for (int w = 0; w < kConsumers * kWarpgroupWarps; ++w) softmax.sum += smem.row_sum[w][row];
    scale[r] = !whole && !PartialTiles::normalised(C::kOutType) ? 1.0f
               : softmax.empty()                                ? 0.0f
                                                                : factor / softmax.sum;
    to[r] = whole ? rows.out(p, row) : p.partials.row(tile, row);
    if (threadIdx.x >= kLanes) continue;
    if (whole) {
      *rows.lse(p, row) = softmax.lse();
    } else {
      *p.partials.header(tile, row) = {softmax.max_log2, softmax.sum, 0.0f, 0.0f};
    }
  }
  // Of row 8 j + i.
  const auto scale_of = [&](int j, int i) {
    return __shfl_sync(kAllLanes, scale[8 * j / kLanes], 8 * j % kLanes + i);
  };
  const auto address_of = [&](int j, int i) {
    const auto address = reinterpret_cast<uint64_t>(to[8 * j / kLanes]);
    return reinterpret_cast<uint8_t*>(__shfl_sync(kAllLanes, address, 8 * j % kLanes + i));
  };
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    const float s[2] = {scale_of(j, 2 * at.t), scale_of(j, 2 * at.t + 1)};
    if constexpr (C::kCodes) {  // 8 neighbouring columns of two rows
      const int32_t column = 256 * wg + 64 * at.warp + at.g * 8;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        uint8_t* const out = address_of(j, 2 * at.t + e);
        if (out == nullptr) continue;
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          words[i] = pack_out<C::kOutType>(attend.o[i][4 * j + e] * s[e],
                                           attend.o[i][4 * j + 2 + e] * s[e]);
        }
        *reinterpret_cast<uint4*>(out + 2 * column) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    } else {  // columns g and g + 8 of the warp's 16 in each product; then two of row g
      uint8_t* const out = address_of(j, at.g);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float* const o = attend.o[i / 2] + 4 * j + i % 2 * 2;
        const uint32_t word =
            flash_mla::sm90::transpose(pack_out<C::kOutType>(o[0] * s[0], o[1] * s[1]));
        const int32_t column = 256 * wg + 64 * (i / 2) + 16 * at.warp + 8 * (i % 2) + 2 * at.t;
        if (out != nullptr) *reinterpret_cast<uint32_t*>(out + 2 * column) = word;
      }
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

}  // namespace flash_mla::mla_decode_dense::sm90::transposed
