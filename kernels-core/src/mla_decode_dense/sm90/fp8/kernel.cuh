// Dense MLA decode on Hopper, float8 caches.
//
//   out[r] = sum_j softmax_j(scale q[r].k[j]) k[j][0:512]
//                                         for the 16, 32 or 64 query rows r of an M tile
//
// Tile: these rows x 64 keys. Tokens come into shared memory as they are in the cache, 36 or 41 KB
// a tile; the consumers convert them to fp16 in registers, where the transposed products take them.
//
//   warps  registers  role
//   0-3    208        attend: Q K^T and softmax of even tiles; columns 0-255 of O
//   4-7    208        attend: of odd tiles; columns 256-511 of O
//   8-11   88         load: the CTA's items, page table, K by TMA (warp 8); Q, converted (9-11)
//
//   barrier      arrivals                          phase
//   q_full       load                              pass
//   q_empty      8 consumer warps: rows are stored pass
//   kv_full[s]   load + bytes of the tile          fill of stage s
//   kv_empty[s]  8 consumer warps                  fill of stage s
//   max_full[w]  4 warps of warpgroup w            tile of warpgroup w
//   p_full[w]    4 warps of warpgroup w            tile of warpgroup w
//   p_empty[w]   4 warps of the other              tile of warpgroup w
//
// Bottleneck (README.md has the numbers): with 16 rows device memory, with 64 the tensor cores.
#pragma once

#include "mla_decode_dense/sm90/fp8/store.cuh"

namespace flash_mla::mla_decode_dense::sm90::fp8 {

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
      flash_mla::sm90::init(smem.kv_full[s], 1);
      flash_mla::sm90::init(smem.kv_empty[s], kConsumers * kWarpgroupWarps);
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
    flash_mla::sm90::prefetch_map(maps.codes);
    if constexpr (C::kRope) flash_mla::sm90::prefetch_map(maps.rope);
    if constexpr (C::kScaled) flash_mla::sm90::prefetch_map(maps.scales);
  }
  const auto& runs = measure_after_predecessor(p, smem.p);

  const int warpgroup = uniform(thread / kWarpgroup);
  if (warpgroup == kConsumers) {
    flash_mla::sm90::give_registers<kProducerRegisters>();
    load(p, maps, smem, runs, team, member);
  } else {
    flash_mla::sm90::take_registers<kConsumerRegisters>();
    consume(p, smem, warpgroup, member);
    // The last loads have been read: K's stages are free for the merge.
    flash_mla::sm90::named_barrier_sync(kMerging, kConsumerThreads);
    merge_split_units<DType::kBFloat16, PartColumns::kInOrder, kConsumerThreads>(
        p, smem.split_items, smem.num_split, member, kPartWriters, thread, smem.k, smem.outcomes,
        [] { flash_mla::sm90::named_barrier_sync(kMerging, kConsumerThreads); });
  }
}

}  // namespace flash_mla::mla_decode_dense::sm90::fp8
