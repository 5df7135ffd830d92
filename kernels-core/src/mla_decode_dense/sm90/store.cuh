// The end of an item in a consumer warpgroup: normalise, and store the result or the partial
// result.
#pragma once

#include "mla_decode_dense/gpu.cuh"
#include "mla_decode_dense/sm90/attend.cuh"

namespace flash_mla::mla_decode_dense::sm90 {

// Warps that have rows of a part, in both warpgroups.
__device__ __forceinline__ int32_t part_writers(const GpuParams& p) {
  return kConsumers * ceil_div(p.partials.rows, kTileRows / kWarpgroupWarps);
}

// Stores this thread's two rows where `to` says, 32 columns at a time, of which four lanes write 64
// bytes of a row: as they have them (PartColumns::kFragments), or in order by way of the warp's
// part of P's place.
template <DType kOut, PartColumns kColumns>
__device__ __forceinline__ void store_rows(const Accumulators& acc, uint8_t* const (&to)[2],
                                           uint8_t* stages, int lane) {
  constexpr int kRowStageBytes = 64;
  static_assert(kColumnBlockBytes == kConsumers * kTileRows * kRowStageBytes);
  if (!__any_sync(kAllLanes, to[0] != nullptr || to[1] != nullptr)) return;
  uint8_t* const stage =
      stages + static_cast<int>(threadIdx.x) / kLanes * (kLanes / 2) * kRowStageBytes;
  // 16-byte chunk c of row r lies at chunk c ^ (r / 2 % 4): no bank conflicts either way.
  const int stage_row = lane % 16;
  const uint32_t put = flash_mla::sm90::smem_address(stage) + stage_row * kRowStageBytes;
#pragma unroll
  for (int i = 0; i < 128; i += 16) {
    uint4 chunk[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float* o = acc.o[i / 64] + i % 64 + 2 * r;
      chunk[r] = make_uint4(
          flash_mla::sm90::pack<kOut>(o[0], o[1]), flash_mla::sm90::pack<kOut>(o[4], o[5]),
          flash_mla::sm90::pack<kOut>(o[8], o[9]), flash_mla::sm90::pack<kOut>(o[12], o[13]));
    }
    if constexpr (kColumns == PartColumns::kInOrder) {
      __syncwarp();
      const uint32_t words[2][4] = {{chunk[0].x, chunk[1].x, chunk[0].y, chunk[1].y},
                                    {chunk[0].z, chunk[1].z, chunk[0].w, chunk[1].w}};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = 2 * half + lane / 16;
        flash_mla::sm90::store_matrices(put + ((c ^ (stage_row / 2 % 4)) << 4), words[half]);
      }
      __syncwarp();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int from = lane / 4 + 8 * r;
        chunk[r] = *reinterpret_cast<const uint4*>(stage + from * kRowStageBytes +
                                                   ((lane % 4 ^ (from / 2 % 4)) << 4));
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (to[r] != nullptr) *reinterpret_cast<uint4*>(to[r] + 4 * i) = chunk[r];
    }
  }
}

template <class Cfg>
__device__ __forceinline__ void store(const GpuParams& p, SharedStorage<Cfg>& smem,
                                      Accumulators& acc, int32_t member, uint32_t index, int wg,
                                      int row, int lane) {
  constexpr DType kOut = kMmaType<Cfg>;
  const ItemSlot& slot = smem.feed.slots[index % 2];
  const WorkItem item = slot.item;
  const bool whole = item.num_parts == 1;
  const bool leads = lane % 4 == 0;  // of the lanes that have the row
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    acc.sum[r] += __shfl_xor_sync(kAllLanes, acc.sum[r], 1);
    acc.sum[r] += __shfl_xor_sync(kAllLanes, acc.sum[r], 2);
  }
  float sum[2];  // over both warpgroups, which have the same maximum by now
  if (whole || PartialTiles::normalised(kOut)) {
    float (&row_sum)[kConsumers][kTileRows] = smem.row_sum[index % 2];
    if (leads) {
      row_sum[wg][row] = acc.sum[0];
      row_sum[wg][row + 8] = acc.sum[1];
    }
    flash_mla::sm90::named_barrier_sync(kItemDone, kConsumerThreads);
    const float factor = whole ? descale(p.descale_k, p.descale_k_stride, item.request) : 1.0f;
    float scale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = row_sum[0][row + 8 * r] + row_sum[1][row + 8 * r];
      scale[r] = sum[r] == 0.0f ? 0.0f : __fdividef(factor, sum[r]);
    }
#pragma unroll
    for (int i = 0; i < 128; ++i) acc.o[i / 64][i % 64] *= scale[i / 2 % 2];
  }

  const auto in_pass = [&](int32_t tile_row) {
    if (slot.only_token < 0) return true;
    return TileRows(p, item, member, slot.length).token(p, tile_row) == slot.only_token;
  };
  const int byte_column = wg * 512 + lane % 4 * 16;
  uint8_t* to[2] = {nullptr, nullptr};
  if (whole) {
    const TileRows rows(p, item, member, slot.length);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t tile_row = row + 8 * r;
      if (!rows.valid(p, tile_row) || !in_pass(tile_row)) continue;
      to[r] = rows.out(p, tile_row) + byte_column;
      if (leads && wg == 0) *rows.lse(p, tile_row) = SoftmaxRow{acc.max[r], sum[r]}.lse();
    }
    store_rows<kOut, PartColumns::kInOrder>(acc, to, smem.p, lane);
  } else {
    const int64_t tile = partial_tile(p.grid, item, member, item.part);
    uint8_t* const first = p.partials.row(tile, row) + byte_column;
    PartialTiles::Header* const header = p.partials.header(tile, row);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row + 8 * r >= p.partials.rows || !in_pass(row + 8 * r)) continue;
      to[r] = first + 8 * r * PartialTiles::kRowBytes;
      if (!leads) continue;
      if (wg == 0) {
        *reinterpret_cast<float2*>(header + 8 * r) = make_float2(acc.max[r], acc.sum[r]);
      } else {
        header[8 * r].sum_b = acc.sum[r];
      }
    }
    store_rows<kOut, PartColumns::kFragments>(acc, to, smem.p, lane);
    // Tells the others of the unit; they meet after their last items.
    if (p.grid.invariant_splits == 0 && slot.last) {
      if (row - lane / 4 < p.partials.rows) {
        split_unit(p, item, member, part_writers(p)).arrive();
      }
      if (threadIdx.x == kConsumerThreads - 1) smem.split_items[smem.num_split++] = item;
    }
    flash_mla::sm90::named_barrier_sync(kItemDone, kConsumerThreads);
  }
  // The first warpgroup writes P of the next item, but not before the second is done with its
  // place.
  if (wg == 1) flash_mla::sm90::named_barrier_arrive(kStored, kConsumerThreads);
}

}  // namespace flash_mla::mla_decode_dense::sm90
