// The end of an item in a consumer warpgroup: normalise, and store the result or the partial
// result.
#pragma once

#include "mla_decode_dense/gpu.cuh"
#include "mla_decode_dense/sm90/attend.cuh"

namespace flash_mla::mla_decode_dense::sm90 {

template <class Cfg>
__device__ __forceinline__ void store(const GpuParams& p, SharedStorage<Cfg>& smem,
                                      Accumulators& acc, int32_t member, uint32_t index, int wg,
                                      int row, int lane) {
  constexpr DType kOut = Cfg::v.kv == KvFormat::kFp16 ? DType::kFloat16 : DType::kBFloat16;
  // A row's sum: over the quad, then over the warpgroups, which have the same maximum by now.
  float (&row_sum)[kConsumers][kTileRows] = smem.row_sum[index % 2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    acc.sum[r] += __shfl_xor_sync(kAllLanes, acc.sum[r], 1);
    acc.sum[r] += __shfl_xor_sync(kAllLanes, acc.sum[r], 2);
    if (lane % 4 == 0) row_sum[wg][row + 8 * r] = acc.sum[r];
  }
  flash_mla::sm90::named_barrier_sync(kItemDone, kConsumerThreads);

  const ItemSlot& slot = smem.items[index % 2];
  const WorkItem item = slot.item;
  const TileRows rows(p, item, member, slot.length);
  const auto stored = [&](int32_t tile_row) {
    return rows.valid(p, tile_row) &&
           (slot.only_token < 0 || rows.token(p, tile_row) == slot.only_token);
  };
  const bool whole = item.num_parts == 1;
  const float factor = whole ? descale(p.descale_k, p.descale_k_stride, item.request) : 1.0f;
  const int64_t tile = whole ? 0 : partial_tile(p.grid, item, member, item.part);
  float scale[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int32_t tile_row = row + 8 * r;
    const SoftmaxRow softmax = {acc.max[r], row_sum[0][tile_row] + row_sum[1][tile_row]};
    scale[r] = softmax.empty() ? 0.0f : factor / softmax.sum;
    if (wg == 0 && lane % 4 == 0 && stored(tile_row)) {
      *(whole ? rows.lse(p, tile_row) : p.partials.lse(tile) + tile_row) = softmax.lse();
    }
  }

  // A warp's 16 rows, 32 columns at a time, through its part of P's place: from there 4 lanes write
  // 64 bytes of a row, where the fragments would give 16. A row is 512 elements of 16 bits, in the
  // result and in a partial one.
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  if (__any_sync(kAllLanes, stored(row) || stored(row + 8))) {
    constexpr int kStageBytes = kColumnBlockBytes / (kConsumers * kWarpgroupWarps);
    constexpr int kRowStageBytes = 64;
    static_assert(kStageBytes == 16 * kRowStageBytes);
    uint8_t* const stage = smem.p + warp * kStageBytes;
    // 16-byte chunk c of row r lies at chunk c ^ (r / 2 % 4): no bank conflicts either way.
    const int stage_row = lane % 16;
    const uint32_t put = flash_mla::sm90::smem_address(stage) + stage_row * kRowStageBytes;
    uint8_t* to[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t tile_row = row + 8 * r;
      to[r] = nullptr;
      if (!stored(tile_row)) continue;
      to[r] = (whole ? rows.out(p, tile_row)
                     : p.partials.out(tile) + tile_row * PartialTiles::kRowBytes) +
              wg * 512 + lane % 4 * 16;
    }
#pragma unroll
    for (int i = 0; i < 128; i += 16) {
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int e = i % 64 + 8 * half + 2 * k;
          words[k] = flash_mla::sm90::pack<kOut>(acc.o[i / 64][e] * scale[k % 2],
                                                 acc.o[i / 64][e + 1] * scale[k % 2]);
        }
        const int chunk = 2 * half + lane / 16;
        flash_mla::sm90::store_matrices(put + ((chunk ^ (stage_row / 2 % 4)) << 4), words);
      }
      __syncwarp();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int from = lane / 4 + 8 * r;
        if (to[r] != nullptr) {
          *reinterpret_cast<uint4*>(to[r] + 4 * i) = *reinterpret_cast<const uint4*>(
              stage + from * kRowStageBytes + ((lane % 4 ^ (from / 2 % 4)) << 4));
        }
      }
    }
  }
  // The first warpgroup writes P of the next item, but not before the second is done with its
  // place.
  if (wg == 1) flash_mla::sm90::named_barrier_arrive(kStored, kConsumerThreads);
  if (whole || p.grid.invariant_splits > 0 || !slot.last) return;
  // Tells the others of the unit; they meet after their last items.
  flash_mla::sm90::named_barrier_sync(kPartWritten, kConsumerThreads);
  if (threadIdx.x == 0) {
    split_unit(p, item, member).arrive();
    smem.split_items[smem.num_split] = item;
    ++smem.num_split;
  }
}

}  // namespace flash_mla::mla_decode_dense::sm90
