// The end of an item in a warpgroup of values: normalise, and store the result or the partial one.
#pragma once

#include "mla_decode_sparse/sm90/values.cuh"

namespace flash_mla::mla_decode_sparse::sm90 {

template <class Cfg>
__device__ __forceinline__ void store(const GpuParams& p, SharedStorage<Cfg>& smem,
                                      Values<Cfg>& values, int32_t member, uint32_t slot, int wg) {
  using C = Config<Cfg>;
  constexpr int kN = C::kRows;
  constexpr DType kOut = DType::kBFloat16;
  static_assert(!PartialTiles::normalised(kOut));
  const Place at;
  const WorkItem item = smem.slots[slot].item;
  const TileRows rows(p, item, member);
  const bool whole = item.num_parts == 1;
  const int64_t tile = whole ? 0 : partial_tile(p.grid, item, member, item.part);
  const int32_t column = 256 * wg + 64 * at.warp + at.g * 8;
  const bool tells = wg == 0 && at.warp == 0;  // for all warps, which have the rows too
#pragma unroll
  for (int first = 0; first < kN; first += kLanes) {
    // Of row `first` + lane.
    const int32_t row = first + at.lane;
    float scale = 0.0f;
    uint8_t* to = nullptr;
    if (row < kN && rows.valid(p, row)) {
      const SoftmaxRow softmax = {smem.row_max[slot][row], smem.row_sum[slot][row]};
      if (whole) {
        const float lse = softmax.lse();
        scale = softmax.empty() ? 0.0f : 1.0f / softmax.sum;
        if (const float* const sink = rows.sink(p, row)) scale *= sink_factor(lse, *sink);
        to = rows.out(p, row);
        if (tells) *rows.lse(p, row) = lse;
      } else {
        scale = 1.0f;
        to = p.partials.row(tile, row);
        if (tells) *p.partials.header(tile, row) = {softmax.max_log2, softmax.sum, 0.0f, 0.0f};
      }
    }
    __syncwarp();
#pragma unroll
    for (int j = first / 8; j < (first + kLanes) / 8 && j < kN / 8; ++j) {
      const auto of_row = [&](auto value, int e) {
        return __shfl_sync(kAllLanes, value, 8 * j % kLanes + 2 * at.t + e);
      };
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float s = of_row(scale, e);
        uint8_t* const out =
            reinterpret_cast<uint8_t*>(of_row(reinterpret_cast<unsigned long long>(to), e));
        if (out == nullptr) continue;
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          words[i] = pack_out<kOut>(values.o[i][4 * j + e] * s, values.o[i][4 * j + 2 + e] * s);
        }
        *reinterpret_cast<uint4*>(out + 2 * column) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
  flash_mla::sm90::arrive_warp(smem.item_empty[slot]);
  if (whole || p.grid.invariant_splits > 0) return;
  // Tells the others of the unit; they meet after their last items.
  split_unit(p, item, member, kValueWarps).arrive();
  if (threadIdx.x == 0) smem.split_items[smem.num_split++] = item;
}

}  // namespace flash_mla::mla_decode_sparse::sm90
