// The role of storing: an item's rows, as results or as a part for merging.
#pragma once

#include <cstdint>

#include "device/portable/attend.cuh"
#include "device/split_reduce.cuh"

namespace flash_mla::portable {

template <class D>
__device__ __forceinline__ void store_item(const typename D::Params& p, const WorkItem& item,
                                           const Attend<D>& attend) {
  using C = typename D::Config;
  constexpr DType kOut = C::kType;
  const typename D::Rows rows = D::rows(p, item);
  const bool whole = item.num_parts == 1;
  const float item_factor = whole ? D::item_factor(p, item.request) : 1.0f;
  const int64_t tile = whole ? 0 : partial_tile(p.grid, item, /*member=*/0, item.part);
  const int c = attend.lane() % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int32_t row = attend.row(r);
    if (!rows.valid(p, row)) continue;
    const SoftmaxRow& softmax = attend.softmax[r];
    if (attend.slab() == 0 && c == 0) {
      if (whole) {
        *rows.lse(p, row) = softmax.lse();
      } else {
        *p.partials.header(tile, row) = {softmax.max_log2, softmax.sum, 0.0f, 0.0f};
      }
    }
    const bool normalised = whole || PartialTiles::normalised(kOut);
    const float factor = item_factor * (whole ? D::row_factor(p, rows, row, softmax) : 1.0f);
    const float scale = !normalised ? 1.0f : softmax.empty() ? 0.0f : factor / softmax.sum;
    uint8_t* const out =
        (whole ? rows.out(p, row) : p.partials.row(tile, row)) + 2 * attend.slab() * kSlabCols;
    const auto pair = [&](int t0, int i0, int t1, int i1) {
      return pack_out<kOut>(attend.o[t0][2 * r + i0] * scale, attend.o[t1][2 * r + i1] * scale);
    };
#pragma unroll
    for (int t = 0; t < kColumnTiles; ++t) {
      if constexpr (!C::kE4m3) {
        *reinterpret_cast<uint32_t*>(out + 2 * (t * 8 + c * 2)) = pair(t, 0, t, 1);
      } else if (t % 2 == 0) {
        *reinterpret_cast<uint2*>(out + 2 * (t * 8 + c * 4)) =
            make_uint2(pair(t, 0, t + 1, 0), pair(t, 1, t + 1, 1));
      }
    }
  }
}

}  // namespace flash_mla::portable
