// Dense MLA decode on Hopper, float8 caches, and 16-bit caches with few query rows.
//
//   out[r] = sum_j softmax_j(scale q[r].k[j]) k[j][0:512]
//                                         for the 16, 32 or 64 query rows r of an M tile
//
// Tile: these rows x 64 keys. Tokens come into shared memory as they are in the cache, 36, 41 or 72
// KB a tile. The products are transposed, so that few rows cost little, and codes can be converted
// to fp16 in the registers that the products read.
//
//   warps  registers   role
//   0-3    208 or 216  attend: even tiles
//   4-7    208 or 216  attend: odd tiles
//   8-11   88 or 72    load: the CTA's items, page table, K by TMA (warp 8); Q: 16-bit by TMA (9),
//                      float8 with conversions (9-11); 16-bit K in small pages (10-11)
//
// With 16 and 32 rows the two warpgroups work each for itself, with a maximum, sums and all of O's
// columns of its own, and add up at the end of a pass. With 64 rows O takes the registers of both:
// each has half of its columns, for all tiles, and reads P of the other's; a row's maximum is
// common.
//
//   barrier       arrivals                           phase
//   q_full        load, + bytes of Q (16-bit)        pass
//   q_empty       8 consumer warps: rows are stored  pass
//   kv_full[s][]  load + bytes of the piece          fill of stage s
//   kv_empty[s]   the 4 warps of the tile; 64 rows:  fill of stage s
//                 8 consumer warps
//   64 rows:
//   max_full[w]   4 warps of warpgroup w             tile of warpgroup w
//   p_full[w]     4 warps of warpgroup w             tile of warpgroup w
//   p_empty[w]    4 warps of the other               tile of warpgroup w
//
// Bottleneck (README.md has the numbers): with 16 rows device memory, with 64 each warpgroup's own
// chain of dependent work.
#pragma once

#include "mla_decode_dense/sm90/transposed/store.cuh"

namespace flash_mla::mla_decode_dense::sm90::transposed {

template <class Cfg>
__device__ __forceinline__ void consume(const GpuParams& p, SharedStorage<Cfg>& smem, int wg,
                                        int32_t member) {
  Attend<Cfg> attend(p, smem, wg, member);
  uint32_t tiles = 0;
#pragma unroll 1
  for (uint32_t index = 0;; ++index) {
    flash_mla::sm90::wait(smem.feed.q_full, index % 2);
    const WorkItem& item = smem.feed.slots[index % 2].item;
    if (uniform(item.request) < 0) break;
    const int32_t count = uniform(item.block_end - item.block_begin);
    attend.pass(index, tiles);
    attend.add_up_output();
    store(p, smem, attend, member, index, wg);
    tiles += count;
  }
}

template <class Cfg>
__global__ void __launch_bounds__(kThreads, 1)
    kernel(const __grid_constant__ GpuParams p, const __grid_constant__ TensorMaps maps) {
  using C = Config<Cfg>;
  extern __shared__ __align__(1024) uint8_t raw_smem[];
  auto& smem = *reinterpret_cast<SharedStorage<Cfg>*>(raw_smem);
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t team = static_cast<int32_t>(blockIdx.x) / p.grid.team;
  const int32_t member = static_cast<int32_t>(blockIdx.x) % p.grid.team;

  if (thread == 0) {
    for (int s = 0; s < C::kStages; ++s) {
      for (Barrier& full : smem.kv_full[s]) flash_mla::sm90::init(full, 1);
      flash_mla::sm90::init(smem.kv_empty[s], (C::kShared ? kConsumers : 1) * kWarpgroupWarps);
    }
    for (int wg = 0; wg < kConsumers; ++wg) {
      flash_mla::sm90::init(smem.max_full[wg], kWarpgroupWarps);
      flash_mla::sm90::init(smem.p_full[wg], kWarpgroupWarps);
      flash_mla::sm90::init(smem.p_empty[wg], kWarpgroupWarps);
    }
    flash_mla::sm90::init(smem.feed.q_full, 1);
    flash_mla::sm90::init(smem.feed.q_empty, kConsumers * kWarpgroupWarps);
    flash_mla::sm90::fence_barrier_init();
    smem.num_split = 0;
  }
  if (thread == kConsumerThreads) {
    flash_mla::sm90::prefetch_map(maps.keys);
    if constexpr (!C::kCodes) flash_mla::sm90::prefetch_map(maps.q);
    if constexpr (C::kRope && C::kCodes) flash_mla::sm90::prefetch_map(maps.rope);
    if constexpr (C::kScaled) flash_mla::sm90::prefetch_map(maps.scales);
  }
  if constexpr (!C::kCodes) {
    clear_query_rows(smem.q, C::kColumnBlocks, C::kQueryBlockBytes, p.grid.tiles.rows());
  }
  const auto& runs = measure_after_predecessor(p, smem.p);

  const int warpgroup = uniform(thread / kWarpgroup);
  if (warpgroup == kConsumers) {
    flash_mla::sm90::give_registers<kProducerRegisters<C::kConsumerRegisters>>();
    load(p, maps, smem, runs, team, member);
  } else {
    flash_mla::sm90::take_registers<C::kConsumerRegisters>();
    consume(p, smem, warpgroup, member);
    // The last loads have been read: K's stages are free for the merge.
    flash_mla::sm90::named_barrier_sync(kMerging, kConsumerThreads);
    merge_split_units<Op, C::kOutType, PartColumns::kInOrder, kConsumerThreads>(
        p, smem.split_items, smem.num_split, member, kPartWriters, thread, smem.k, smem.outcomes,
        [] { flash_mla::sm90::named_barrier_sync(kMerging, kConsumerThreads); });
  }
}

}  // namespace flash_mla::mla_decode_dense::sm90::transposed
