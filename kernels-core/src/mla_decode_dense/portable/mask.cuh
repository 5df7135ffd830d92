// Which of an item's keys the rows of a lane attend: a query token's, those up to its own.
#pragma once

#include <cstdint>

#include "mla_decode_dense/portable/load.cuh"

namespace flash_mla::mla_decode_dense::portable {

struct Mask {
  static constexpr bool kRowsDiffer = true;

  uint32_t row_end[2];     // keys that each row attends; of a row which is none, no end
  uint32_t first_row_end;  // of the CTA's tile, at most that

  __device__ __forceinline__ void start(const GpuParams& p, const TileRows& rows,
                                        const ItemKeys& keys, const int32_t (&numbers)[2]) {
    first_row_end = keys.first_row_end;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_end[r] = rows.valid(p, numbers[r]) ? rows.visible(p, numbers[r]) : 0xffffffffu;
    }
  }
  // Some row may not attend all keys up to `end`.
  __device__ __forceinline__ bool cuts(uint32_t end) const { return end > first_row_end; }
  __device__ __forceinline__ bool hides(int r, uint32_t key) const { return key >= row_end[r]; }
};

}  // namespace flash_mla::mla_decode_dense::portable
