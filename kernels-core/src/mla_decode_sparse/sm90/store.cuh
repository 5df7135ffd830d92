// The end of an item in a warpgroup of values: normalise, and store the result or the partial one.
#pragma once

#include "mla_decode_sparse/sm90/values.cuh"

namespace flash_mla::mla_decode_sparse::sm90 {

template <class Cfg>
__device__ __forceinline__ void store(const GpuParams& p, SharedStorage<Cfg>& smem,
                                      Values<Cfg>& values, int32_t member, uint32_t slot, int wg) {
  constexpr int kN = Config<Cfg>::kRows;
  constexpr DType kOut = DType::kBFloat16;
  static_assert(!PartialTiles::normalised(kOut));
  const Place at;
  const WorkItem item = smem.slots[slot].item;
  const TileRows rows(p, item, member);
  const bool whole = item.num_parts == 1;
  const int32_t column = 256 * wg + 64 * at.warp + at.g * 8;
  // Rows 8 j + 2 t and one on.
  uint8_t* out =
      whole ? rows.out(p, 0) : p.partials.row(partial_tile(p.grid, item, member, item.part), 0);
  const int64_t pitch = whole ? 2 * p.out_stride_h : PartialTiles::kRowBytes;
  out += 2 * at.t * pitch + 2 * column;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    const float2 scale = *reinterpret_cast<const float2*>(&smem.row_scale[slot][8 * j + 2 * at.t]);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float s = e == 0 ? scale.x : scale.y;
        words[i] = pack_out<kOut>(values.o[i][4 * j + e] * s, values.o[i][4 * j + 2 + e] * s);
      }
      if (rows.valid(p, 8 * j + 2 * at.t + e)) {
        *reinterpret_cast<uint4*>(out + (8 * j + e) * pitch) =
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
